"""Sequences driven through a transformer step by step, over a paged cache made to be hostile.

Blocks are dealt out shuffled; every block starts as NaN; unused entries of the block table point
at a block that stays NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.forward_batch import ForwardBatch, PrefillChunks
from worker.models.spec import ModelSpec
from worker.models.transformer import Transformer
from worker.sharding import ShardSpec


class PoisonedCache:
    """A KV cache of NaN, block outermost and all layers within a block."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: ShardSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        shape = (
            num_blocks,
            spec.num_layers,
            2,
            block_size,
            shard.num_local_kv_heads,
            spec.head_dim,
        )
        self._blocks = torch.full(shape, torch.nan, dtype=dtype)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._blocks[:, index, 0], self._blocks[:, index, 1]


@dataclass(frozen=True)
class Piece:
    """Tokens start..start+length of one sequence, as one decode row or one prefill chunk."""

    sequence: int
    start: int
    length: int
    is_decode: bool


@dataclass(frozen=True)
class PagedBatches:
    """Builds batches for sequences of known tokens; sequence i lives in slot i + 1."""

    sequences: tuple[tuple[int, ...], ...]
    block_size: int
    block_table: Tensor
    num_blocks: int

    @staticmethod
    def create(
        sequences: tuple[tuple[int, ...], ...], block_size: int, seed: int = 0
    ) -> PagedBatches:
        needed = [-(-len(tokens) // block_size) for tokens in sequences]
        num_blocks = 2 + sum(needed)  # block 0 is the dummy, the last is never written
        order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)) + 1
        table = torch.full((len(needed) + 1, max(needed) + 1), num_blocks - 1, dtype=torch.int32)
        table[0] = 0
        used = 0
        for index, count in enumerate(needed):
            table[index + 1, :count] = order[used : used + count]
            used += count
        return PagedBatches(sequences, block_size, table, num_blocks)

    def batch(
        self, pieces: list[Piece], num_padding_rows: int = 0, logit_rows: Tensor | None = None
    ) -> ForwardBatch:
        """One step; padding rows follow the decode rows."""
        decodes = [piece for piece in pieces if piece.is_decode]
        chunks = [piece for piece in pieces if not piece.is_decode]
        rows = [(p, position) for p in decodes for position in [p.start]]
        chunk_rows = [
            (p, position) for p in chunks for position in range(p.start, p.start + p.length)
        ]
        padding = [0] * num_padding_rows
        both = (rows, chunk_rows)

        def column(values: tuple[list[int], list[int]]) -> Tensor:
            return torch.tensor(values[0] + padding + values[1], dtype=torch.int64)

        tokens = tuple([self.sequences[p.sequence][at] for p, at in part] for part in both)
        positions = tuple([at for _, at in part] for part in both)
        mapping = tuple([self._cache_slot(p.sequence, at) for p, at in part] for part in both)
        decode_lens = [p.start + 1 for p in decodes] + [1] * num_padding_rows
        return ForwardBatch(
            token_ids=column((tokens[0], tokens[1])),
            positions=column((positions[0], positions[1])),
            slot_mapping=column((mapping[0], mapping[1])),
            num_decode_rows=len(decode_lens),
            decode_slots=torch.tensor([p.sequence + 1 for p in decodes] + padding),
            decode_lens=torch.tensor(decode_lens, dtype=torch.int32),
            block_table=self.block_table,
            chunks=_chunks(chunks) if chunks else None,
            logit_rows=logit_rows,
        )

    def _cache_slot(self, sequence: int, position: int) -> int:
        block = int(self.block_table[sequence + 1, position // self.block_size])
        return block * self.block_size + position % self.block_size


def _chunks(pieces: list[Piece]) -> PrefillChunks:
    slots, starts = tuple(p.sequence + 1 for p in pieces), tuple(p.start for p in pieces)
    lens = tuple(p.length for p in pieces)
    cu_lens = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    return PrefillChunks(
        slots=torch.tensor(slots),
        starts=torch.tensor(starts, dtype=torch.int32),
        cu_lens=cu_lens,
        max_len=max(lens),
        host_slots=slots,
        host_starts=starts,
        host_lens=lens,
    )


def staggered_steps(
    lengths: list[int], prompt_lengths: list[int], chunk_size: int
) -> list[list[Piece]]:
    """Prefill in chunks, then decode; each sequence starts when the one before it first decodes,
    so that steps mix decode rows with chunks."""
    done = [0] * len(lengths)
    steps = []
    while done != lengths:
        step: list[Piece] = []
        for index, (length, prompt) in enumerate(zip(lengths, prompt_lengths, strict=True)):
            started = index == 0 or done[index - 1] >= prompt_lengths[index - 1]
            if not started or done[index] == length:
                continue
            is_decode = done[index] >= prompt
            count = 1 if is_decode else min(chunk_size, prompt - done[index])
            step.append(Piece(index, done[index], count, is_decode))
        for piece in step:
            done[piece.sequence] += piece.length
        steps.append(step)
    return steps


def logits_of_steps(
    model: Transformer, batches: PagedBatches, steps: list[list[Piece]], cache: PoisonedCache
) -> list[Tensor]:
    """Each sequence's local logits, float32 [length, padded_vocab]; steps have a padding row."""
    out = [
        torch.full((len(tokens), model.shard.padded_vocab), torch.nan)
        for tokens in batches.sequences
    ]
    for pieces in steps:
        has_decode = any(piece.is_decode for piece in pieces)
        batch = batches.batch(pieces, num_padding_rows=int(has_decode))
        logits = model.local_logits(model.forward(batch, cache)).float()
        row = 0
        for piece in [p for p in pieces if p.is_decode]:
            out[piece.sequence][piece.start] = logits[row]
            row += 1
        row += has_decode
        for piece in [p for p in pieces if not p.is_decode]:
            out[piece.sequence][piece.start : piece.start + piece.length] = logits[
                row : row + piece.length
            ]
            row += piece.length
    return out
