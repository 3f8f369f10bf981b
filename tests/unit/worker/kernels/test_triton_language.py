"""A machine without Triton imports the kernels' modules and refuses to launch by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worker.kernels.triton_language import next_power_of_2

WITHOUT_TRITON = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch
from worker.kernels.norm import rms_norm, rms_norm_reference
from worker.kernels.triton_language import TritonNotFound
from worker.ops import cpu_ops, cuda_ops
x, weight = torch.ones(2, 4), torch.ones(4)
assert cpu_ops().rms_norm(x, weight, 0.0).equal(x)
for call in (cuda_ops, lambda: rms_norm(x, weight, 0.0)):
    try:
        call()
    except TritonNotFound as error:
        print(error)
"""


def test_without_triton_references_work_and_kernels_are_refused_by_name() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert len(lines) == 2 and all("'triton'" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (1000, 1024)]
)
def test_next_power_of_2_is_the_smallest_that_is_enough(value: int, power: int) -> None:
    assert next_power_of_2(value) == power
