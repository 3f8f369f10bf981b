"""The prefill part of a mixed step: laid out on the host, copied once, viewed on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.forward_batch import PrefillChunks
from worker.tables import Chunk

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChunkShape:
    """Sizes of a layout; what a step's own chunks do not fill is padding."""

    num_chunks: int
    num_finals: int
    num_tokens: int

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> ChunkShape:
        """The exact shape of a step's chunks."""
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        return cls(len(chunks), sum(chunk.is_final for chunk in chunks), num_tokens)

    @property
    def parts(self) -> list[int]:
        """Lengths of the packed parts: slots, starts, cu_lens; finals; tokens."""
        return [
            *(self.num_chunks, self.num_chunks, self.num_chunks + 1),
            *(self.num_finals, self.num_finals),
            *(self.num_tokens, self.num_tokens, self.num_tokens),
        ]


@dataclass(frozen=True)
class ChunkTokens:
    """The chunks of a step on the device."""

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    slot_mapping: Tensor  # int64 [num_tokens]
    chunks: PrefillChunks
    final_slots: Tensor  # int64 [num_finals]
    final_tokens: Tensor  # int64 [num_finals], index of each final chunk's last token


def pack_chunks(
    chunks: Sequence[Chunk], block_size: int, shape: ChunkShape | None = None
) -> Int64Array:
    """One int64 array of everything the device needs; `shape`, if given, pads it.

    Padding chunks are empty, padding tokens are token 0 at position 0 of the dummy block, padding
    finals name the dummy slot.
    """
    exact = ChunkShape.of(chunks)
    shape = shape or exact
    packed = np.zeros(sum(shape.parts), np.int64)
    slots, starts, cu_lens, final_slots, final_tokens, ids, positions, mapping = np.split(
        packed, np.cumsum(shape.parts)[:-1]
    )
    cu_lens[:] = exact.num_tokens
    row = final = 0
    for index, chunk in enumerate(chunks):
        length = len(chunk.token_ids)
        end = row + length
        slots[index], starts[index], cu_lens[index] = chunk.sequence.slot, chunk.start, row
        ids[row:end] = chunk.token_ids
        positions[row:end] = np.arange(chunk.start, chunk.start + length)
        blocks = np.asarray(chunk.sequence.block_ids, np.int64)
        in_block = positions[row:end] % block_size
        mapping[row:end] = blocks[positions[row:end] // block_size] * block_size + in_block
        if chunk.is_final:
            final_slots[final], final_tokens[final] = chunk.sequence.slot, end - 1
            final += 1
        row = end
    return packed


def scored_tokens(chunks: Sequence[Chunk]) -> tuple[Int64Array, Int64Array]:
    """(index among the step's chunk tokens, target) of each position that has a target; int64."""
    indices, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    row = 0
    for chunk in chunks:
        if chunk.targets is not None:
            indices.append(np.arange(row, row + len(chunk.targets)))
            targets.append(chunk.targets.astype(np.int64))
        row += len(chunk.token_ids)
    return np.concatenate(indices), np.concatenate(targets)


def view_chunks(packed: Tensor, shape: ChunkShape, chunks: Sequence[Chunk]) -> ChunkTokens:
    """The parts of a packed array on the device; `chunks` give the CPU references their lengths."""
    slots, starts, cu_lens, final_slots, final_tokens, ids, positions, mapping = torch.split(
        packed, shape.parts
    )
    return ChunkTokens(
        token_ids=ids,
        positions=positions,
        slot_mapping=mapping,
        chunks=PrefillChunks(
            slots=slots,
            starts=starts.int(),
            cu_lens=cu_lens.int(),
            max_len=shape.num_tokens,
            host_slots=tuple(chunk.sequence.slot for chunk in chunks),
            host_starts=tuple(chunk.start for chunk in chunks),
            host_lens=tuple(len(chunk.token_ids) for chunk in chunks),
        ),
        final_slots=final_slots,
        final_tokens=final_tokens,
    )
