"""Python in a process that cannot import this repository: what a user of the hub has."""

import os
import subprocess
import sys

import torch

NO_REPO = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path = [path for path in sys.path if "__editable__" not in path]
for name in ("arb_kernels", "configuration_arb", "modeling_arb", "tokenization_arb", "training_arb"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported: this proves nothing")
"""


def fresh_process(tmp_path, code, *arguments, **variables):
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": threads, **variables}
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
