"""The one place that imports Triton, which a CPU-only installation does not have."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpcomm.errors import CommError

HAS_TRITON = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if HAS_TRITON else None
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else None
_cuda: Any = importlib.import_module("triton.language.extra.cuda") if HAS_TRITON else None
_target: Any = importlib.import_module("triton.language.target_info") if HAS_TRITON else None


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


@device_function
def after_previous():  # type: ignore[no-untyped-def]
    """What a kernel does before it reads or writes memory: waits until the kernel before it is over
    and its memory in place, and lets the next one be launched, which waits in its turn.

    So the launch of a kernel lies beside the run of the one before (programmatic dependent launch,
    CUDA programming guide). All that are launched with `early_launch` begin with it.
    """
    if _target.cuda_capability_geq(9, 0):
        _cuda.gdc_wait()
        _cuda.gdc_launch_dependents()


@functools.cache
def early_launch() -> dict[str, bool]:
    """The launch option of kernels that begin with `after_previous`. Asked for on their device."""
    return {"launch_pdl": True} if _target.cuda_capability_geq(9, 0) else {}


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments in order, and how many programs of how many warps run it.

    It begins with `after_previous`.
    """

    kernel: Any
    arguments: tuple[object, ...]
    num_programs: int
    num_warps: int

    def run(self) -> None:
        """Enqueue on the current stream of the current device."""
        options = early_launch()
        self.kernel[(self.num_programs,)](*self.arguments, num_warps=self.num_warps, **options)

    def compile(self) -> Any:
        """Compile the variant that `run` needs, without launching it."""
        options = early_launch()
        return self.kernel.warmup(*self.arguments, num_warps=self.num_warps, grid=(1,), **options)
