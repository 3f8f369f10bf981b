"""How one model is cut over ranks: heads, FFN columns and vocabulary rows, for any world size.

Heads. With at least as many KV heads as ranks, whole groups (a KV head and its query heads) are
dealt out, so 9 query / 3 KV heads on 2 ranks are 6 + 3. With fewer, query heads are dealt out in
contiguous ranges and a rank stores every KV head that its range touches.

FFN columns and vocabulary rows are dealt out in granules of 64, of which the last may be partial.
What a rank lacks of its padded size is zero (FFN) or masked (vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from worker.errors import UnsupportedModel
from worker.models.spec import ModelSpec

GRANULE: Final = 64


@dataclass(frozen=True)
class ShardSpec:
    """One rank's part of a model. Starts count from the full model's first head, column, row."""

    rank: int
    world_size: int
    q_head_start: int
    num_local_q_heads: int
    kv_head_start: int
    num_local_kv_heads: int
    q_per_kv: int  # query heads per KV head, of the full model
    q_offset: int  # local q head i belongs to local KV head (i + q_offset) // q_per_kv
    ffn_start: int
    num_local_ffn: int  # real columns; may be 0
    padded_ffn: int  # a multiple of 64, at least 64
    vocab_start: int
    num_local_vocab: int  # real rows; may be 0
    padded_vocab: int  # the same on every rank, so that logits can be gathered


def make_shard_spec(spec: ModelSpec, rank: int, world_size: int) -> ShardSpec:
    """The part of `spec` that `rank` holds.

    Raises UnsupportedModel where a rank would have no query head.
    """
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    if world_size > spec.num_q_heads:
        raise UnsupportedModel(
            f"tensor-parallel degree {world_size} is above num_attention_heads"
            f" {spec.num_q_heads}: a rank would have no head; use at most {spec.num_q_heads} ranks"
        )
    q_start, num_q, kv_start, num_kv = _deal_heads(spec, rank, world_size)
    ffn_start, num_ffn = _deal_granules(spec.ffn_size, rank, world_size)
    vocab_start, num_vocab = _deal_granules(spec.vocab_size, rank, world_size)
    _, largest_vocab = _deal_granules(spec.vocab_size, 0, world_size)
    return ShardSpec(
        rank=rank,
        world_size=world_size,
        q_head_start=q_start,
        num_local_q_heads=num_q,
        kv_head_start=kv_start,
        num_local_kv_heads=num_kv,
        q_per_kv=spec.q_per_kv,
        q_offset=q_start - kv_start * spec.q_per_kv,
        ffn_start=ffn_start,
        num_local_ffn=num_ffn,
        padded_ffn=_padded(num_ffn),
        vocab_start=vocab_start,
        num_local_vocab=num_vocab,
        padded_vocab=_padded(largest_vocab),
    )


def _deal(num_items: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, count) of a contiguous, near-even split; the first ranks get what is left over."""
    share, left_over = divmod(num_items, world_size)
    start = rank * share + min(rank, left_over)
    return start, share + (rank < left_over)


def _deal_heads(spec: ModelSpec, rank: int, world_size: int) -> tuple[int, int, int, int]:
    """(q_head_start, num_local_q_heads, kv_head_start, num_local_kv_heads)."""
    group = spec.q_per_kv
    if spec.num_kv_heads >= world_size:
        kv_start, num_kv = _deal(spec.num_kv_heads, rank, world_size)
        return kv_start * group, num_kv * group, kv_start, num_kv
    q_start, num_q = _deal(spec.num_q_heads, rank, world_size)
    kv_start = q_start // group
    kv_end = (q_start + num_q - 1) // group + 1
    return q_start, num_q, kv_start, kv_end - kv_start


def _deal_granules(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, count) in columns or rows."""
    num_granules = -(-size // GRANULE)
    first, count = _deal(num_granules, rank, world_size)
    start = min(first * GRANULE, size)
    return start, min((first + count) * GRANULE, size) - start


def _padded(size: int) -> int:
    return max(-(-size // GRANULE), 1) * GRANULE
