# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The end of a step: chosen tokens go into the device's tables, or stop a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpcomm.triton_language import after_previous, early_launch
from worker.device_tables import DeviceTables
from worker.kernels.triton_language import jit, tl
from worker.sampling.local_best import winning_rank
from worker.sampling.record import RECORD_WORDS, BestRecord
from worker.sampling.tables import ROW_WORDS, STOP_IDS_WORD, SlotSampling
from worker.sampling_params import MAX_STOP_IDS

FLAG_STOP = 1
FLAG_NOT_FINITE = 2
_BLOCK = 64


@dataclass(frozen=True)
class Advanced:
    """What a step reports of each row, and whether the row's sequence got a token."""

    token_ids: Tensor  # int32 [N], -1 without one
    flags: Tensor  # uint8 [N], FLAG_* bits
    emits: Tensor  # bool [N]


def advance(
    token_ids: Tensor, finite: Tensor, slots: Tensor, tables: DeviceTables, sampling: SlotSampling
) -> Advanced:
    """Advances the sequences of `slots` int64 [N] that are not inert by `token_ids` int64 [N].

    `finite` bool [N]: False stops a sequence without a token. The slots of sequences that are not
    inert differ.
    """
    positions = tables.position[slots]
    active = (positions < tables.limit[slots]) & (tables.stopped[slots] == 0)
    emits, bad = active & finite, active & ~finite
    stop_ids = sampling.rows(slots).stop_ids
    stops = emits & (stop_ids == token_ids[:, None]).any(dim=1)
    chosen = token_ids.int()
    # Padding rows all write the dummy slot, and all write the values that it has.
    tables.last_token[slots] = torch.where(emits, chosen, tables.last_token[slots])
    tables.position[slots] = (positions + emits).int()
    tables.stopped[slots] = tables.stopped[slots] | (stops | bad).int()
    flags = stops.to(torch.uint8) * FLAG_STOP + bad.to(torch.uint8) * FLAG_NOT_FINITE
    return Advanced(torch.where(emits, chosen, -1), flags, emits)


def best_token(records: BestRecord) -> tuple[Tensor, Tensor]:
    """Token int64 [N] and whether it is one, bool [N], of gathered records [world_size, N]."""
    token_ids = records.token_id.gather(0, winning_rank(records))[0].long()
    return token_ids, records.value.amax(dim=0).isfinite()


def advance_best_reference(
    records: BestRecord, slots: Tensor, tables: DeviceTables, sampling: SlotSampling
) -> Advanced:
    """`advance` by the best of gathered records [world_size, N]."""
    return advance(*best_token(records), slots, tables, sampling)


@jit(
    varying=("num_rows",),
    unaligned=("position_ptr", "last_token_ptr", "limit_ptr", "stopped_ptr", "slots_ptr"),
)
def _advance_best_kernel(
    records_ptr,
    slots_ptr,
    params_ptr,
    position_ptr,
    last_token_ptr,
    limit_ptr,
    stopped_ptr,
    token_ids_ptr,
    flags_ptr,
    emits_ptr,
    num_rows,
    WORLD: tl.constexpr,
    RECORD_WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    STOP: tl.constexpr,
    NOT_FINITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    after_previous()
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=inside, other=0)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token_id = tl.zeros((BLOCK,), tl.int32)
    for rank in range(WORLD):
        record = records_ptr + (rank * num_rows + rows) * RECORD_WORDS
        value = tl.load(record, mask=inside, other=0).to(tl.float32, bitcast=True)
        better = value > best
        best = tl.where(better, value, best)
        token_id = tl.where(better, tl.load(record + 1, mask=inside, other=0), token_id)
    # Neither infinity; the kernel that makes records leaves no NaN.
    finite = (best > float("-inf")) & (best < float("inf"))
    position = tl.load(position_ptr + slots)
    active = (position < tl.load(limit_ptr + slots)) & (tl.load(stopped_ptr + slots) == 0) & inside
    emits = active & finite
    lanes = tl.arange(0, NUM_STOP_IDS)
    stop_ids = tl.load(params_ptr + slots[:, None] * ROW_WORDS + STOP_IDS + lanes[None, :])
    is_stop = tl.max((stop_ids == token_id[:, None]).to(tl.int32), axis=1) > 0
    stops = emits & is_stop
    bad = active & (finite == 0)
    tl.store(last_token_ptr + slots, token_id, mask=emits)
    tl.store(position_ptr + slots, position + 1, mask=emits)
    tl.store(stopped_ptr + slots, tl.full((BLOCK,), 1, tl.int32), mask=stops | bad)
    flags = tl.where(stops, STOP, 0) + tl.where(bad, NOT_FINITE, 0)
    tl.store(token_ids_ptr + rows, tl.where(emits, token_id, -1), mask=inside)
    tl.store(flags_ptr + rows, flags.to(tl.uint8), mask=inside)
    tl.store(emits_ptr + rows, emits.to(tl.uint8), mask=inside)


def advance_best(
    records: BestRecord, slots: Tensor, tables: DeviceTables, sampling: SlotSampling
) -> Advanced:
    """`advance_best_reference` as one kernel; inert rows write nothing."""
    world_size, num_rows, words = records.packed.shape
    assert words == RECORD_WORDS and records.packed.is_contiguous() and slots.is_contiguous()
    device = slots.device
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=device)
    flags, emits = torch.empty(2, num_rows, dtype=torch.uint8, device=device)
    _advance_best_kernel[(-(-num_rows // _BLOCK),)](
        records.packed,
        slots,
        sampling.packed,
        tables.position,
        tables.last_token,
        tables.limit,
        tables.stopped,
        token_ids,
        flags,
        emits,
        num_rows,
        WORLD=world_size,
        RECORD_WORDS=RECORD_WORDS,
        ROW_WORDS=ROW_WORDS,
        STOP_IDS=STOP_IDS_WORD,
        NUM_STOP_IDS=MAX_STOP_IDS,
        STOP=FLAG_STOP,
        NOT_FINITE=FLAG_NOT_FINITE,
        BLOCK=_BLOCK,
        num_warps=4,
        **early_launch(),
    )
    return Advanced(token_ids, flags, emits.view(torch.bool))
