"""glibc accepts every setting: it refuses, for one, a mapping threshold above 32 MB."""

import subprocess
import sys

CODE = "from training_arb.cpu_allocator import keep_freed_memory; print(keep_freed_memory())"


def test_glibc_accepts_the_settings():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == str(sys.platform.startswith("linux"))
