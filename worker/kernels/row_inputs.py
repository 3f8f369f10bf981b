# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What the decode rows of a step compute, read from the device's tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpcomm.triton_language import after_previous, early_launch
from worker.device_tables import DeviceTables
from worker.kernels.triton_language import jit, tl
from worker.tables import DUMMY_SLOT

_BLOCK = 128


@dataclass(frozen=True)
class RowInputs:
    """One entry a row, on the tables' device.

    A row is inert when its sequence stands at its limit or has stopped, and so are padding rows: it
    computes position 0 of the dummy slot, where nothing of anybody is.
    """

    slots: Tensor  # int64
    token_ids: Tensor  # int64
    positions: Tensor  # int64
    slot_mapping: Tensor  # int64, block_id * block_size + offset
    decode_slots: Tensor  # int64, the dummy for inert rows
    decode_lens: Tensor  # int32, positions + 1
    next_positions: Tensor  # int64, of the token that is sampled; of inert rows any


def row_inputs_reference(tables: DeviceTables, num_rows: int) -> RowInputs:
    """Of rows 0..num_rows-1."""
    slots = tables.row_slots[:num_rows].long()
    stored = tables.position[slots].long()
    active = (stored < tables.limit[slots]) & (tables.stopped[slots] == 0)
    # An inert row may stand one past its blocks and the rope table: it computes position 0.
    positions = torch.where(active, stored, 0)
    blocks = torch.where(active, tables.block_table[slots, positions // tables.block_size], 0)
    return RowInputs(
        slots=slots,
        token_ids=tables.last_token[slots].long(),
        positions=positions,
        slot_mapping=blocks * tables.block_size + positions % tables.block_size,
        decode_slots=torch.where(active, slots, DUMMY_SLOT),
        decode_lens=(positions + 1).int(),
        next_positions=positions + 1,
    )


@jit(
    varying=("num_rows",),
    unaligned=("position_ptr", "last_token_ptr", "limit_ptr", "stopped_ptr", "row_slots_ptr")
    + ("block_table_ptr", "lens_ptr", "columns_ptr"),
)
def _row_inputs_kernel(
    position_ptr,
    last_token_ptr,
    limit_ptr,
    stopped_ptr,
    row_slots_ptr,
    block_table_ptr,
    columns_ptr,
    lens_ptr,
    num_rows,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    DUMMY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    after_previous()
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    slots = tl.load(row_slots_ptr + rows, mask=inside, other=DUMMY).to(tl.int64)
    stored = tl.load(position_ptr + slots)
    active = (stored < tl.load(limit_ptr + slots)) & (tl.load(stopped_ptr + slots) == 0)
    position = tl.where(active, stored, 0).to(tl.int64)
    table = block_table_ptr + slots * max_blocks + position // BLOCK_SIZE
    block = tl.load(table, mask=active, other=0).to(tl.int64)
    out = columns_ptr + rows
    tl.store(out, slots, mask=inside)
    tl.store(out + num_rows, tl.load(last_token_ptr + slots).to(tl.int64), mask=inside)
    tl.store(out + 2 * num_rows, position, mask=inside)
    tl.store(out + 3 * num_rows, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)
    tl.store(out + 4 * num_rows, tl.where(active, slots, DUMMY), mask=inside)
    tl.store(out + 5 * num_rows, position + 1, mask=inside)
    tl.store(lens_ptr + rows, (position + 1).to(tl.int32), mask=inside)


def row_inputs(tables: DeviceTables, num_rows: int) -> RowInputs:
    """`row_inputs_reference` as one kernel: a step begins with it, and launches add up."""
    device = tables.device
    columns = torch.empty(6, num_rows, dtype=torch.int64, device=device)
    lens = torch.empty(num_rows, dtype=torch.int32, device=device)
    _row_inputs_kernel[(-(-num_rows // _BLOCK),)](
        tables.position,
        tables.last_token,
        tables.limit,
        tables.stopped,
        tables.row_slots,
        tables.block_table,
        columns,
        lens,
        num_rows,
        tables.block_table.shape[1],
        BLOCK_SIZE=tables.block_size,
        DUMMY=DUMMY_SLOT,
        BLOCK=_BLOCK,
        num_warps=4,
        **early_launch(),
    )
    slots, token_ids, positions, slot_mapping, decode_slots, next_positions = columns.unbind()
    return RowInputs(slots, token_ids, positions, slot_mapping, decode_slots, lens, next_positions)
