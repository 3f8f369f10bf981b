"""Programs that need Triton in a mode of its own: under the interpreter, or compiling only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpcomm.triton_language import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
_REPOSITORY = Path(__file__).parents[3]


def run_program(module: str, *arguments: str, **environment: str) -> str:
    """Run `python -m module` of this folder; its stdout, or a failure that shows its stderr."""
    finished = subprocess.run(
        [sys.executable, "-m", f"tests.unit.tpcomm.{module}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
