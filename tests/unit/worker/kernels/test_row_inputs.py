"""What decode rows compute, by the reference."""

from __future__ import annotations

import torch

from worker.device_tables import DeviceTables
from worker.kernels.row_inputs import row_inputs_reference


def test_active_rows_compute_their_next_position_and_others_position_0_of_the_dummy() -> None:
    tables = DeviceTables(4, 3, 16, torch.device("cpu"))
    tables.position[1:] = torch.tensor([17, 20, 48, 0])
    tables.limit[1:] = torch.tensor([32, 32, 48, 0])  # the third stands one past its blocks
    tables.stopped[2] = 1
    tables.last_token[1:] = torch.tensor([71, 72, 73, 74])
    tables.block_table[1:] = torch.arange(12, dtype=torch.int32).view(4, 3) + 100
    tables.row_slots[:] = torch.tensor([3, 1, 2, 0])
    rows = row_inputs_reference(tables, 4)
    assert rows.slots.tolist() == [3, 1, 2, 0]
    assert rows.token_ids.tolist() == [73, 71, 72, 0]
    assert rows.positions.tolist() == [0, 17, 0, 0]
    assert rows.slot_mapping.tolist() == [0, 101 * 16 + 1, 0, 0]
    assert rows.decode_slots.tolist() == [0, 1, 0, 0]
    assert rows.decode_lens.tolist() == [1, 18, 1, 1]
    assert rows.next_positions.tolist() == [1, 18, 1, 1]
