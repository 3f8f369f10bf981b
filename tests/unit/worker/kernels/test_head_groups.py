"""Query heads find the KV head that the contract names."""

from __future__ import annotations

import pytest
import torch

from worker.kernels.head_groups import group_queries, ungroup_queries


@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "q_per_kv", "q_offset"),
    [(9, 3, 3, 0), (5, 2, 4, 2), (3, 2, 4, 3), (1, 1, 8, 7)],
)
def test_each_query_head_lands_in_its_group_and_comes_back(
    num_q_heads: int, num_kv_heads: int, q_per_kv: int, q_offset: int
) -> None:
    q = torch.randn(2, num_q_heads, 4)
    grouped = group_queries(q, num_kv_heads, q_per_kv, q_offset)
    assert grouped.shape == (2, num_kv_heads, q_per_kv, 4)
    for head in range(num_q_heads):
        kv_head, member = divmod(head + q_offset, q_per_kv)
        assert torch.equal(grouped[:, kv_head, member], q[:, head])
    assert int(grouped.count_nonzero()) == q.numel()
    assert torch.equal(ungroup_queries(grouped, num_q_heads, q_offset), q)


def test_more_query_heads_than_groups_hold_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        group_queries(torch.zeros(1, 6, 4), num_kv_heads=1, q_per_kv=4, q_offset=0)
