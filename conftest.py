"""What all tests share: threads, and the mark of the cases that `make test` leaves out.

One need not read this to understand Bone.
"""

import functools
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before PyTorch is imported. With more threads than cores, they mostly wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A parameter of a test that only `make test-all` runs: exhaustive(3000).
exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
