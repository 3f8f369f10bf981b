"""The rows of one step, as device tensors: what every layer of a forward pass is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PrefillChunks:
    """The prefill part of a batch: contiguous runs of prompt tokens, one per sequence.

    Device tensors steer the kernels; the host tuples hold the same values for the CPU
    references, which loop over chunks and must not read a device to do so. Where a chunk list
    is padded to a captured shape, the padding chunks have length 0 and slot 0.
    """

    slots: Tensor  # int64 [num_chunks], row of the block table
    starts: Tensor  # int32 [num_chunks], tokens of the sequence already in the cache
    cu_lens: Tensor  # int32 [num_chunks + 1], running sum of the chunk lengths, from 0
    max_len: int  # the longest chunk
    host_slots: tuple[int, ...]
    host_starts: tuple[int, ...]
    host_lens: tuple[int, ...]


@dataclass(frozen=True)
class ForwardBatch:
    """One step's tokens: the decode rows first, one token each, then the chunk tokens.

    Padding and inert rows have slot 0, length 1 and a slot mapping inside block 0.
    """

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    slot_mapping: Tensor  # int64 [num_tokens], block_id * block_size + offset
    num_decode_rows: int
    decode_slots: Tensor  # int64 [num_decode_rows]
    decode_lens: Tensor  # int32 [num_decode_rows], context length including this token
    block_table: Tensor  # int32 [num_slots, max_blocks_per_seq]
    chunks: PrefillChunks | None
    logit_rows: Tensor | None  # int64 [num_logit_rows]; None: every token
