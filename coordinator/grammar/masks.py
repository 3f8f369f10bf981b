"""Which token ids may follow, as it travels: packed bits, or the ids where they are few."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protos.lockstep.v1 import worker_pb2

UInt8Array = npt.NDArray[np.uint8]


def mask_of_bits(bits: bytes, vocab_size: int) -> UInt8Array:
    """uint8 [(vocab_size + 7) // 8] of a mask of any length; bits from `vocab_size` on are 0."""
    mask = np.zeros((vocab_size + 7) // 8, np.uint8)
    given = np.frombuffer(bits, np.uint8)[: len(mask)]
    mask[: len(given)] = given
    if vocab_size % 8:
        mask[-1] &= (1 << vocab_size % 8) - 1
    return mask


def without_ids(mask: UInt8Array, token_ids: Sequence[int]) -> UInt8Array:
    """A copy of `mask` that does not allow `token_ids`; `mask` itself if it allows nothing else."""
    rest = mask.copy()
    for token_id in token_ids:
        rest[token_id // 8] &= ~np.uint8(1 << token_id % 8)
    return rest if rest.any() else mask


def packed_mask(mask: UInt8Array) -> worker_pb2.SlotMask:
    """The smaller of the two forms; the slot is not set."""
    # Counted before they are listed, which costs 25 times as much.
    if 4 * int(np.bitwise_count(mask).sum()) >= len(mask):
        return worker_pb2.SlotMask(bits=mask.tobytes())
    ids = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
    return worker_pb2.SlotMask(ids=ids.astype("<i4").tobytes())
