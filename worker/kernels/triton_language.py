"""The one place that imports Triton, which a CPU-only installation does not have.

Kernels are declared with `jit` from here. Without Triton the declarations still import, so that the
references beside them can be used, and launching one raises `TritonNotFound`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from worker.errors import WorkerError


class TritonNotFound(WorkerError):
    """A kernel was asked for on a machine without Triton."""


HAS_TRITON = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if HAS_TRITON else None
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else None


def require_triton() -> None:
    """Raise TritonNotFound unless kernels can be launched."""
    if not HAS_TRITON:
        raise TritonNotFound(
            "the CUDA kernels need the Python package 'triton', which is not installed: install a "
            "CUDA build of torch (it brings triton), or run with --devices cpu"
        )


class MissingKernel:
    """Stands in for a kernel where there is no Triton; a launch raises TritonNotFound."""

    def __getitem__(self, grid: object) -> Any:
        require_triton()
        raise AssertionError("a kernel declared without Triton, launched with it")


def jit(
    *, varying: Sequence[str] = (), unaligned: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Declare a Triton kernel.

    varying: integer arguments that differ from step to step; they must not select a specialised
    variant, or a step would compile. unaligned: pointers that may be any slice of a larger tensor,
    for the same reason.
    """

    def declare(function: Callable[..., Any]) -> Any:
        if not HAS_TRITON:
            return MissingKernel()
        return triton.jit(
            do_not_specialize=list(varying), do_not_specialize_on_alignment=list(unaligned)
        )(function)

    return declare


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value` (at least 1)."""
    return 1 << max(value - 1, 0).bit_length()
