"""What can go wrong in a collective, as one small tree."""

from __future__ import annotations

from collections.abc import Sequence


class CommError(RuntimeError):
    """A communicator could not be made, or a collective could not be carried out."""


class CommAborted(CommError):
    """The communicator was aborted, here or by a peer; it cannot be used again."""


class CommTimeout(CommError):
    """A time limit passed before every rank arrived.

    `missing_ranks` are the ranks that had not arrived when the limit passed, as far as this rank
    can tell; empty where the backend cannot tell.
    """

    def __init__(self, message: str, missing_ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing_ranks = tuple(missing_ranks)


class NcclError(CommError):
    """A function of libnccl returned a code other than success (`ncclResult_t` in nccl.h)."""

    def __init__(self, code: int, text: str, function: str) -> None:
        super().__init__(f"{function} returned {code}: {text}")
        self.code = code
        self.text = text
        self.function = function


class NcclNotFound(CommError):
    """No libnccl could be loaded; `tried` names every place that was looked at, and why not."""

    def __init__(self, tried: Sequence[str]) -> None:
        places = "; ".join(tried)
        super().__init__(
            f"no libnccl.so.2 could be loaded (tried: {places}); install nvidia-nccl-cu12 or "
            "nvidia-nccl-cu13 to match torch's CUDA, or name the library file"
        )
        self.tried = tuple(tried)


class CudaDriverError(CommError):
    """A function of libcuda returned a code other than CUDA_SUCCESS (`CUresult` in cuda.h)."""

    def __init__(self, code: int, text: str, function: str) -> None:
        super().__init__(f"{function} returned {code}: {text}")
        self.code = code
        self.text = text
        self.function = function
