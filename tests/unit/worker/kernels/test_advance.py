"""How a step ends, by the references: who gets a token, who stops, who is left alone."""

from __future__ import annotations

import torch

from worker.device_tables import DeviceTables
from worker.kernels.advance import FLAG_NOT_FINITE, FLAG_STOP, advance, best_token
from worker.sampling import SlotParams, SlotSampling
from worker.sampling.record import RECORD_WORDS, BestRecord

CPU = torch.device("cpu")


def make_tables() -> tuple[DeviceTables, SlotSampling]:
    """Slots 1 to 4 at position 5: 3 stands at its limit, 4 has stopped; stop ids 7, 8."""
    tables, sampling = DeviceTables(5, 2, 16, CPU), SlotSampling(6, 64, 0, CPU)
    tables.position[1:] = 5
    tables.limit[1:] = torch.tensor([9, 9, 5, 9, 9])
    tables.stopped[4] = 1
    tables.last_token[1:] = 60
    sampling.set_rows([1, 2], [SlotParams(stop_ids=(7, 0)), SlotParams(stop_ids=(8,))])
    return tables, sampling


def test_active_rows_take_their_tokens_and_inert_and_padding_rows_change_nothing() -> None:
    tables, sampling = make_tables()
    slots, tokens = torch.tensor([1, 2, 3, 4, 0, 0]), torch.tensor([8, 9, 10, 11, 12, 13])
    advanced = advance(tokens, torch.ones(6, dtype=torch.bool), slots, tables, sampling)
    assert advanced.token_ids.tolist() == [8, 9, -1, -1, -1, -1]
    assert advanced.flags.tolist() == [0] * 6
    assert tables.position.tolist() == [0, 6, 6, 5, 5, 5]
    assert tables.last_token.tolist() == [0, 8, 9, 60, 60, 60]


def test_a_stop_id_is_the_slot_s_own_and_is_the_last_token() -> None:
    tables, sampling = make_tables()
    slots = torch.tensor([1, 2])
    for token, flags in (([7, 7], [FLAG_STOP, 0]), ([7, 8], [0, FLAG_STOP])):
        ok = torch.ones(2, dtype=torch.bool)
        advanced = advance(torch.tensor(token), ok, slots, tables, sampling)
        assert advanced.flags.tolist() == flags
    assert tables.stopped[1:3].tolist() == [1, 1]
    assert tables.position[1:3].tolist() == [6, 7]


def test_a_row_without_a_finite_best_stops_without_a_token() -> None:
    tables, sampling = make_tables()
    advanced = advance(
        torch.tensor([7, 9]), torch.tensor([False, True]), torch.tensor([1, 2]), tables, sampling
    )
    assert advanced.token_ids.tolist() == [-1, 9]
    assert advanced.flags.tolist() == [FLAG_NOT_FINITE, 0]
    assert (tables.stopped[1].item(), tables.position[1].item()) == (1, 5)


def test_the_best_of_all_ranks_wins_and_the_lowest_rank_among_equals() -> None:
    records = BestRecord(torch.zeros(2, 4, RECORD_WORDS, dtype=torch.int32))
    records.value.copy_(
        torch.tensor([[1.0, 2.0, 3.0, -torch.inf], [2.0, 2.0, torch.inf, -torch.inf]])
    )
    records.packed[:, :, 1] = torch.tensor([[1, 2, 3, 4], [11, 12, 13, 14]])
    token_ids, finite = best_token(records)
    assert token_ids[:2].tolist() == [11, 2]
    assert finite.tolist() == [True, True, False, False]
