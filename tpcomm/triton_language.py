"""The one place that imports Triton, which a CPU-only installation does not have."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpcomm.errors import CommError

HAS_TRITON = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if HAS_TRITON else None
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else None


def require_triton() -> None:
    """Raise CommError unless kernels can be launched."""
    if not HAS_TRITON:
        raise CommError(
            "the Python package 'triton' is not installed; CUDA builds of torch bring it"
        )


def jit(*, varying: Sequence[str]) -> Callable[[Callable[..., Any]], Any]:
    """Declare a kernel; without Triton the function stays as it is and must not be launched.

    varying: arguments whose value must not select a specialised variant, lest a step compile.
    """

    def declare(function: Callable[..., Any]) -> Any:
        if not HAS_TRITON:
            return function
        names = list(varying)
        return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)

    return declare


def device_function(function: Callable[..., Any]) -> Any:
    """Declare a function that kernels call; without Triton it stays as it is."""
    return triton.jit(function) if HAS_TRITON else function


def constant(value: int) -> Any:
    """Declare a number that kernels read from their module."""
    return tl.constexpr(value) if HAS_TRITON else value


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments in order, and how many programs of how many warps run it."""

    kernel: Any
    arguments: tuple[object, ...]
    num_programs: int
    num_warps: int

    def run(self) -> None:
        """Enqueue on the current stream of the current device."""
        self.kernel[(self.num_programs,)](*self.arguments, num_warps=self.num_warps)

    def compile(self) -> Any:
        """Compile the variant that `run` needs, without launching it."""
        return self.kernel.warmup(*self.arguments, num_warps=self.num_warps, grid=(1,))
