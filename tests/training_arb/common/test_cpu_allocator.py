"""glibc accepts every setting (it refuses a mapping threshold above 32 MB), and gives memory back when told."""

import subprocess
import sys

import pytest

CODE = "from training_arb.common.cpu_allocator import keep_freed_memory; print(keep_freed_memory())"

RETURN = """
import psutil, torch
from training_arb.common.cpu_allocator import keep_freed_memory, return_freed_memory
def megabytes(): return psutil.Process().memory_info().rss >> 20
keep_freed_memory()
block = [torch.ones(1 << 20) for _ in range(50)]
full = megabytes()
del block
kept = megabytes()
return_freed_memory()
print(full - kept, full - megabytes())
"""


def test_glibc_accepts_the_settings():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == str(sys.platform.startswith("linux"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept_until_it_is_returned():
    done = subprocess.run([sys.executable, "-c", RETURN], capture_output=True, check=True, text=True)
    freed, returned = map(int, done.stdout.split())
    assert freed < 20 and returned > 180
