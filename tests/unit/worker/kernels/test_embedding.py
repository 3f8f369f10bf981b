"""Vocabulary-parallel lookup: the ranks' parts sum to the whole table's rows."""

from __future__ import annotations

import pytest
import torch

from worker.kernels.embedding import embedding_reference


@pytest.mark.parametrize("bounds", [(0, 100), (0, 64, 100), (0, 1, 64, 100, 100)])
def test_shards_sum_to_a_lookup_in_the_whole_table(bounds: tuple[int, ...]) -> None:
    table, token_ids = torch.randn(100, 12), torch.tensor([0, 99, 63, 64, 1, 63])
    total = torch.zeros(6, 12)
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        # Padding rows are NaN: they must never be shown, not even for an id that would land there.
        local = torch.full((70 if len(bounds) > 2 else 100, 12), torch.nan)
        local[: end - start] = table[start:end]
        if end > start:
            total += embedding_reference(token_ids, local, start, end - start)
        else:
            assert torch.equal(embedding_reference(token_ids, local, start, 0), torch.zeros(6, 12))
    assert torch.equal(total, table[token_ids])


def test_token_ids_are_left_alone() -> None:
    token_ids = torch.tensor([5, 6])
    embedding_reference(token_ids, torch.ones(3, 4), 5, 1)
    assert token_ids.tolist() == [5, 6]
