"""The two sets of operations can stand for each other."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from worker.kernels import triton_language
from worker.ops import Ops, cpu_ops, cuda_ops


@pytest.mark.parametrize("name", [field.name for field in fields(Ops)])
def test_a_kernel_takes_what_its_reference_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is launched, so Triton need not be there.
    monkeypatch.setattr(triton_language, "HAS_TRITON", True)
    on_cpu = list(inspect.signature(getattr(cpu_ops(), name)).parameters.values())
    on_cuda = list(inspect.signature(getattr(cuda_ops(), name)).parameters.values())
    assert on_cuda[: len(on_cpu)] == on_cpu
    assert all(extra.default is not extra.empty for extra in on_cuda[len(on_cpu) :])
