"""Programs that exercise Triton kernels without a GPU, each in a process of its own.

Triton reads its environment (interpreter or compiler) when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.kernels.triton_language import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
_REPOSITORY = Path(__file__).parents[2]


def run_program(module: str, **environment: str) -> str:
    """Run `python -m module`; its stdout, or a failure that shows its stderr."""
    finished = subprocess.run(
        [sys.executable, "-m", module],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
