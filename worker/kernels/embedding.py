# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Vocabulary-parallel embedding: a rank looks up the token ids of its own shard."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tpcomm.triton_language import after_previous, early_launch
from worker.kernels.triton_language import jit, tl

_BLOCK = 1024


def embedding_reference(
    token_ids: Tensor, weight_local: Tensor, vocab_start: int, num_local_vocab: int
) -> Tensor:
    """Rows of this rank's shard; ids of other ranks give zero rows, so that a sum completes them.

    token_ids int64 [num_tokens]; weight_local [at least num_local_vocab, hidden_size], of which row
    i is token `vocab_start + i` and rows from num_local_vocab on are padding, never shown.
    """
    local_ids = token_ids - vocab_start
    foreign = (local_ids < 0) | (local_ids >= num_local_vocab)
    rows = functional.embedding(local_ids.masked_fill_(foreign, 0), weight_local)
    return rows.masked_fill_(foreign[:, None], 0.0)


@jit(unaligned=("token_ids_ptr",))
def _embedding_kernel(
    token_ids_ptr,
    weight_ptr,
    out_ptr,
    vocab_start,
    num_local_vocab,
    weight_stride,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    after_previous()
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = dims < HIDDEN
    local_id = tl.load(token_ids_ptr + row) - vocab_start
    ours = (local_id >= 0) & (local_id < num_local_vocab)
    values = tl.load(weight_ptr + local_id * weight_stride + dims, mask=inside & ours, other=0.0)
    tl.store(out_ptr + row * HIDDEN + dims, values, mask=inside)


def embedding(
    token_ids: Tensor, weight_local: Tensor, vocab_start: int, num_local_vocab: int
) -> Tensor:
    """`embedding_reference` as one kernel; foreign ids read no weight."""
    num_tokens, hidden_size = token_ids.shape[0], weight_local.shape[1]
    assert token_ids.dtype == torch.int64 and token_ids.is_contiguous(), token_ids.dtype
    assert weight_local.shape[0] >= num_local_vocab and weight_local.stride(1) == 1
    out = torch.empty(
        (num_tokens, hidden_size), dtype=weight_local.dtype, device=weight_local.device
    )
    _embedding_kernel[(num_tokens, -(-hidden_size // _BLOCK))](
        token_ids,
        weight_local,
        out,
        vocab_start,
        num_local_vocab,
        weight_local.stride(0),
        HIDDEN=hidden_size,
        BLOCK=_BLOCK,
        num_warps=4,
        **early_launch(),
    )
    return out
