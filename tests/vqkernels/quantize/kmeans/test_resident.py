"""Memory of a clustering, measured in a process of its own."""

import subprocess
import sys

import pytest

RUN = """
import sys
import torch
from vqkernels.quantize.kmeans import kmeans

count, entries, iterations = map(int, sys.argv[1:])

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

points = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
before = peak()
found = kmeans(points, entries, iterations=iterations)
assert len(found.codes.unique()) > 0.99 * entries
print(before, peak())
"""


def peaks(count, entries, iterations):
    """MiB resident at most, before and after a clustering of `count` vectors of 8."""
    call = [sys.executable, "-c", RUN, *map(str, (count, entries, iterations))]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def test_no_matrix_of_points_and_entries_is_kept():
    before, after = peaks(1 << 16, 4096, 1)
    # all distances would be 1,024 MiB
    assert after - before < 200


@pytest.mark.sweep
def test_65536_entries_of_2_million_vectors_fit_in_4_gb():
    _, after = peaks(1 << 21, 65536, 2)
    assert after < 4e9 / 2**20
