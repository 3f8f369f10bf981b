"""Query heads by the KV head they read, for shards that do not hold whole groups."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def group_queries(q: Tensor, num_kv_heads: int, q_per_kv: int, q_offset: int) -> Tensor:
    """q [n, num_q_heads, head_dim] -> [n, num_kv_heads, q_per_kv, head_dim].

    Query head i lands in group `(i + q_offset) // q_per_kv`; heads of a group that other ranks hold
    are zero. A view of q where this rank holds whole groups.
    """
    missing = num_kv_heads * q_per_kv - q.shape[1] - q_offset
    assert q_offset >= 0 and missing >= 0, (q.shape, num_kv_heads, q_per_kv, q_offset)
    if q_offset or missing:
        q = functional.pad(q, (0, 0, q_offset, missing))
    return q.view(q.shape[0], num_kv_heads, q_per_kv, q.shape[2])


def ungroup_queries(grouped: Tensor, num_q_heads: int, q_offset: int) -> Tensor:
    """The inverse of `group_queries`, contiguous: [n, num_q_heads, head_dim]."""
    return grouped.flatten(1, 2)[:, q_offset : q_offset + num_q_heads].contiguous()
