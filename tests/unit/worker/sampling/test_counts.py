from __future__ import annotations

import torch

from worker.sampling import SlotSampling, add_outputs, mark_chunk, mark_prompt, update_counts
from worker.sampling.tables import PROMPT_BIT

VOCAB_START, PADDED_VOCAB = 128, 64


def make_tables() -> SlotSampling:
    return SlotSampling(4, PADDED_VOCAB, VOCAB_START, torch.device("cpu"))


def nonzero_counts(tables: SlotSampling) -> dict[tuple[int, int], int]:
    """(slot, token id) -> count word."""
    return {
        (slot, column + VOCAB_START): int(tables.counts[slot, column])
        for slot, column in tables.counts.nonzero().tolist()
    }


def test_prompt_tokens_of_this_shard_are_marked_once_however_often_they_occur() -> None:
    tables = make_tables()
    mark_prompt(tables, 2, torch.tensor([128, 191, 191, 127, 192, 0, 130]))
    assert nonzero_counts(tables) == dict.fromkeys([(2, 128), (2, 130), (2, 191)], PROMPT_BIT)


def test_marking_the_prompt_keeps_output_counts() -> None:
    tables = make_tables()
    add_outputs(tables, 1, torch.tensor([130, 130, 5]))
    mark_prompt(tables, 1, torch.tensor([130, 130, 5]))
    assert nonzero_counts(tables) == {(1, 130): PROMPT_BIT + 2}


def test_chunks_are_divided_at_the_prompt_length() -> None:
    whole, chunked = make_tables(), make_tables()
    ids = torch.tensor([128, 129, 128, 130, 128, 130, 190])
    mark_chunk(whole, 1, ids, 0, 3)
    for start in range(0, 7, 2):
        mark_chunk(chunked, 1, ids[start : start + 2], start, 3)
    expected = {(1, 128): PROMPT_BIT + 1, (1, 129): PROMPT_BIT, (1, 130): 2, (1, 190): 1}
    assert nonzero_counts(whole) == expected == nonzero_counts(chunked)


def test_sampled_tokens_count_in_active_rows_of_their_shard() -> None:
    tables = make_tables()
    slots = torch.tensor([1, 2, 3, 3, 0])
    active = torch.tensor([True, False, True, True, False])
    update_counts(tables, slots, torch.tensor([128, 129, 140, 140, 128]), active)
    update_counts(tables, slots, torch.tensor([64, 129, 192, 140, 150]), active)
    assert nonzero_counts(tables) == {(1, 128): 1, (3, 140): 3}
