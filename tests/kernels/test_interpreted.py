"""The Triton kernels on a CPU: test_ops.py and test_broken.py in a process whose Triton interprets.

A process of its own, for Triton reads TRITON_INTERPRET where a kernel is defined, and other tests import the kernels first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize(("file", "tests"), [("test_ops.py", 120), ("test_broken.py", 11)])
def test_in_the_interpreter(file: str, tests: int) -> None:
    """`tests`: fewer than this must not count as a success."""
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_alone, "-k", "triton or caught", str(HERE / file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= tests, done.stdout[-6000:] + done.stderr[-2000:]
