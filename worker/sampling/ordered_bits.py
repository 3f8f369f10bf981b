"""float32 as integers in the same order, for radix select and for sorts with exact ties."""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF


def to_ordered(values: Tensor) -> Tensor:
    """int32 of the same shape, ordered as the float32 `values`; -0.0 and 0.0 map to one integer."""
    # Adding 0.0 turns -0.0 into 0.0 and leaves everything else alone.
    bits = (values + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & _MAGNITUDE)


def from_ordered(ordered: Tensor) -> Tensor:
    """The float32 that `to_ordered` maps to `ordered` int32."""
    return (ordered ^ ((ordered >> 31) & _MAGNITUDE)).view(torch.float32)


def rank_keys(values: Tensor, token_ids: Tensor) -> Tensor:
    """int64 keys of one broadcast shape: larger value first, among equals the lower id.

    No two ids share a key, so a top-k over keys has one answer.
    """
    return (to_ordered(values).to(torch.int64) << 32) + (_MAGNITUDE - token_ids)


def key_ids(keys: Tensor) -> Tensor:
    """int64 token ids of `rank_keys`."""
    return _MAGNITUDE - (keys & 0xFFFFFFFF)


def key_values(keys: Tensor) -> Tensor:
    """float32 values of `rank_keys`."""
    return from_ordered((keys >> 32).to(torch.int32))
