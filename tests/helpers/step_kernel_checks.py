"""The kernels that begin and end a step against their references, on any device."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from worker.device_tables import DeviceTables
from worker.kernels.advance import Advanced, advance_best_reference
from worker.kernels.row_inputs import row_inputs_reference
from worker.ops import Ops
from worker.sampling import SlotParams, SlotSampling
from worker.sampling.record import RECORD_WORDS, BestRecord

_NUM_SLOTS, _MAX_BLOCKS, _VOCAB = 300, 7, 1000
_BLOCK_SIZE = 16


def make_tables(device: torch.device, seed: int = 0) -> DeviceTables:
    """Random sequences: some at their limit (one past their blocks too), some stopped."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    tables = DeviceTables(_NUM_SLOTS, _MAX_BLOCKS, _BLOCK_SIZE, torch.device("cpu"))
    tables.limit[1:] = draw(_MAX_BLOCKS * _BLOCK_SIZE + 1, _NUM_SLOTS)
    below = (tables.limit[1:] - 1 - draw(3, _NUM_SLOTS)).clamp(min=0)
    at_limit = draw(5, _NUM_SLOTS) == 0
    tables.position[1:] = torch.where(at_limit, tables.limit[1:], below)
    tables.last_token[1:] = draw(_VOCAB, _NUM_SLOTS)
    tables.stopped[1:] = (draw(6, _NUM_SLOTS) == 0).int()
    tables.row_slots[:] = torch.randperm(_NUM_SLOTS, generator=generator).int() + 1
    tables.row_slots[-9:] = 0  # padding
    tables.block_table[1:] = draw(10**6, _NUM_SLOTS, _MAX_BLOCKS) + 1
    moved = DeviceTables(_NUM_SLOTS, _MAX_BLOCKS, _BLOCK_SIZE, device)
    for name in ("position", "last_token", "limit", "stopped", "row_slots", "block_table"):
        getattr(moved, name).copy_(getattr(tables, name))
    return moved


def check_row_inputs(ops: Ops, device: torch.device) -> None:
    """Every row that exists, and what padding rows get."""
    tables = make_tables(device)
    for num_rows in (1, 5, 128, _NUM_SLOTS):
        found, wanted = ops.row_inputs(tables, num_rows), row_inputs_reference(tables, num_rows)
        for field in fields(wanted):
            name = field.name
            assert torch.equal(getattr(found, name), getattr(wanted, name)), (num_rows, name)


def check_advance_best(ops: Ops, device: torch.device, world_size: int) -> None:
    """Winners, ties between ranks, broken rows, stops, inert and padding rows."""
    generator = torch.Generator().manual_seed(world_size)
    sampling = SlotSampling(_NUM_SLOTS + 1, 64, 0, device)
    slots_with_stops = list(range(1, _NUM_SLOTS + 1))
    params = [SlotParams(stop_ids=tuple(range(slot % 17))) for slot in slots_with_stops]
    sampling.set_rows(slots_with_stops, params)
    packed = torch.zeros(world_size, _NUM_SLOTS, RECORD_WORDS, dtype=torch.int32)
    records = BestRecord(packed)
    # Few values, so that ranks tie; few ids, so that stop ids are hit.
    records.value.copy_(torch.randint(0, 3, (world_size, _NUM_SLOTS), generator=generator))
    records.value[:, 3:40:5] = -torch.inf
    records.value[-1, 4:40:5] = torch.inf
    packed[:, :, 1] = torch.randint(0, 24, (world_size, _NUM_SLOTS), generator=generator)
    on_device = BestRecord(packed.to(device))
    left, right = make_tables(device), make_tables(device)
    for num_rows in (1, 70, _NUM_SLOTS):
        some = BestRecord(on_device.packed[:, :num_rows].contiguous())
        slots = left.row_slots[:num_rows].long()
        _compare(
            ops.advance_best(some, slots, left, sampling),
            advance_best_reference(some, slots, right, sampling),
        )
        for name in ("position", "last_token", "stopped"):
            assert torch.equal(getattr(left, name), getattr(right, name)), (num_rows, name)


def _compare(found: Advanced, wanted: Advanced) -> None:
    assert int((wanted.flags == 1).sum()) or len(wanted.flags) == 1
    for field in fields(wanted):
        pair = getattr(found, field.name), getattr(wanted, field.name)
        assert torch.equal(*pair), (field.name, pair)
