"""Decode attention against softmax spelled out row by row, over a poisoned cache."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.kernel_checks import HEAD_SHAPES, HeadShape
from tests.helpers.paged_cache import PagedCache, naive_rows
from worker.kernels.decode_attention import choose_num_splits, decode_attention_reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
@pytest.mark.parametrize("slots", [(3,), (0,), (2, 0, 3, 1), (1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rows_attend_to_their_own_tokens_only(
    block_size: int,
    heads: HeadShape,
    slots: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    lens = (1, 16, 33, 50)
    cache = PagedCache.create(lens, heads.num_kv_heads, heads.head_dim, block_size, dtype, CPU)
    q = torch.randn(len(slots), heads.num_q_heads, heads.head_dim).to(dtype)
    contexts = tuple(lens[slot] for slot in slots)
    tail = (heads.head_dim**-0.5, heads.q_per_kv, heads.q_offset)
    found = decode_attention_reference(
        q,
        cache.k_cache,
        cache.v_cache,
        cache.block_table,
        torch.tensor(slots),
        torch.tensor(contexts, dtype=torch.int32),
        *tail,
    )
    assert found.dtype == dtype and found.is_contiguous()
    wanted = naive_rows(q, cache, slots, contexts, *tail)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_nan_inside_a_row_s_own_context_stays_in_that_row() -> None:
    cache = PagedCache.create((20, 20), 1, 64, 16, torch.float32, CPU)
    cache.v_cache[cache.block_table[0, 0], 3] = torch.nan
    found = decode_attention_reference(
        torch.randn(2, 2, 64),
        cache.k_cache,
        cache.v_cache,
        cache.block_table,
        torch.tensor([0, 1]),
        torch.tensor([20, 20], dtype=torch.int32),
        0.125,
        2,
        0,
    )
    assert found[0].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 256])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("max_context", [1, 128, 129, 8192, 131072])
def test_splits_fill_the_gpu_but_never_outnumber_the_pieces_of_the_context(
    num_rows: int, num_kv_heads: int, max_context: int
) -> None:
    num_splits = choose_num_splits(num_rows, num_kv_heads, max_context, num_sms=132)
    assert num_splits & (num_splits - 1) == 0 and 1 <= num_splits <= 64
    assert num_splits == 1 or (num_splits // 2) * 128 < max_context
    # Half of them would leave SMs idle, unless the batch alone fills the GPU.
    assert num_splits == 1 or num_rows * num_kv_heads * num_splits // 2 < 2 * 132
    if max_context >= 8192:
        assert num_rows * num_kv_heads * num_splits >= min(132, 64 * num_rows * num_kv_heads)
