"""Prefill attention against softmax spelled out token by token, over a poisoned cache."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.kernel_checks import HEAD_SHAPES, HeadShape
from tests.helpers.paged_cache import PagedCache, make_chunks, naive_rows
from worker.kernels.prefill_attention import prefill_attention_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("starts", "lens"), [((0,), (21,)), ((16,), (1,)), ((0, 7, 30, 0), (5, 12, 1, 0))]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_tokens_see_the_cached_prefix_and_their_chunk_up_to_themselves(
    block_size: int,
    heads: HeadShape,
    starts: tuple[int, ...],
    lens: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    stored = tuple(max(start + length, 1) for start, length in zip(starts, lens, strict=True))
    cache = PagedCache.create(stored, heads.num_kv_heads, heads.head_dim, block_size, dtype, CPU)
    slots = tuple(range(len(lens)))
    num_padding = 2
    q = torch.randn(sum(lens) + num_padding, heads.num_q_heads, heads.head_dim).to(dtype)
    tail = (heads.head_dim**-0.5, heads.q_per_kv, heads.q_offset)
    found = prefill_attention_reference(
        q,
        cache.k_cache,
        cache.v_cache,
        cache.block_table,
        make_chunks(slots, starts, lens, CPU),
        *tail,
    )
    assert found.dtype == dtype
    rows = [(slot, starts[slot] + i + 1) for slot, length in enumerate(lens) for i in range(length)]
    row_slots, contexts = zip(*rows, strict=True)
    wanted = naive_rows(q[: sum(lens)], cache, row_slots, contexts, *tail)
    torch.testing.assert_close(found[: sum(lens)].double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(found[sum(lens) :], torch.zeros_like(found[sum(lens) :]))


def test_what_follows_a_chunk_in_its_own_last_block_never_matters() -> None:
    cache = PagedCache.create((40,), 1, 64, 16, torch.float32, CPU)
    q = torch.randn(10, 1, 64)
    chunks = make_chunks((0,), (5,), (10,), CPU)

    def attend() -> torch.Tensor:
        return prefill_attention_reference(
            q, cache.k_cache, cache.v_cache, cache.block_table, chunks, 0.125, 1, 0
        )

    before = attend()
    last_block = cache.block_table[0, 0]
    cache.k_cache[last_block, 15:] = torch.nan
    cache.v_cache[last_block, 15:] = torch.nan
    assert torch.equal(attend(), before)
