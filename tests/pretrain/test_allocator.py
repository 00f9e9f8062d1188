"""The heap keeps large blocks: freeing and taking them again faults no page."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, numpy as np
from pretrain.allocator import keep_heap
print(int(keep_heap()))
def use():
    np.ones(8 << 20)  # 64 MiB, above every mmap threshold of glibc
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_freed_block_is_reused_without_page_faults():
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    ).stdout.split()
    if out[0] == "0":
        pytest.skip("the C library is not glibc")
    pages = 5 * (64 << 20) // resource.getpagesize()
    assert int(out[1]) < pages / 10
