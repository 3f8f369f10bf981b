"""The batch as it stands on the device, changed by one scattered write per command.

All tables are views of one int32 arena, so a command's changes, wherever they fall, are one list of
(flat index, value) pairs: one copy to the device and one kernel, however many tables they touch.
Positions, last tokens and stop flags are advanced on the device by the steps themselves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.tables import AppliedDelta

Int64Array = npt.NDArray[np.int64]


class DeviceTables:
    """Per-slot and per-row state on the device. Used by the device thread alone.

    int32 views: `position` (next position to compute), `last_token`, `limit`, `stopped` (1: chose a
    stop id or had bad logits), each [num_slots]; `row_slots` [max_num_seqs]; `block_table`
    [num_slots, max_blocks_per_seq]. Slot 0 is the dummy: limit 0, so always inert.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks_per_seq: int, block_size: int, device: torch.device
    ) -> None:
        num_slots = max_num_seqs + 1
        sizes = [num_slots] * 4 + [max_num_seqs, num_slots * max_blocks_per_seq]
        self._arena = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        views = torch.split(self._arena, sizes)
        self.position, self.last_token, self.limit, self.stopped, self.row_slots = views[:5]
        self.block_table = views[5].view(num_slots, max_blocks_per_seq)
        self.block_size = block_size
        self.device = device
        self._max_blocks = max_blocks_per_seq

    def write(self, applied: AppliedDelta) -> None:
        """Writes a command's changes; stream-ordered."""
        position, last_token, limit, stopped, row_slots, block_table = self._starts
        pairs = [(limit + slot, value) for slot, value in applied.limits]
        pairs += [(row_slots + row, slot) for row, slot in applied.rows]
        pairs += [
            (block_table + slot * self._max_blocks + index, block_id)
            for slot, index, block_id in applied.blocks
        ]
        for seq in applied.opened:
            pairs += [(stopped + seq.slot, 0), (last_token + seq.slot, 0)]
        for chunk in applied.chunks:
            if chunk.is_final:
                pairs.append((position + chunk.sequence.slot, chunk.sequence.prefill_len - 1))
        if not pairs:
            return
        # A command may raise a limit twice (open, then limits): the last write must win, and a
        # scatter with equal indices promises no order.
        merged = dict(pairs)
        packed = np.array([list(merged.keys()), list(merged.values())], np.int64)
        uploaded = upload(packed, self.device)
        self._arena[uploaded[0]] = uploaded[1].int()


def upload(array: Int64Array, device: torch.device) -> Tensor:
    """Copies to the device in stream order without waiting.

    Pinned memory comes from torch's caching allocator, which guards its reuse by events.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
