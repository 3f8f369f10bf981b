"""Scores of prompt tokens over vocabulary shards against the softmax over all of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.sampling_cases import Row, make_shard
from tests.helpers.thread_comm import ThreadCommunicator, run_ranks
from worker.sampling import PromptScores, SlotParams, score_prompt


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [1, 32, 75])
def test_scores_are_those_of_the_whole_vocabulary(world_size: int, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, 301, generator=generator) * 3
    targets = torch.randint(0, 301, (num_rows,), generator=generator)
    targets[0] = 300
    most = 0

    def one_rank(comm: ThreadCommunicator) -> PromptScores:
        nonlocal most
        local, tables = make_shard(logits, [Row(SlotParams())] * num_rows, comm.rank, world_size)

        def local_logits(rows: Tensor) -> Tensor:
            nonlocal most
            most = max(most, len(rows))
            return local[rows[:, 0].long()]

        hidden = torch.arange(num_rows, dtype=torch.float32)[:, None]
        return score_prompt(hidden, targets, local_logits, tables.vocab_start, comm)

    expected = torch.log_softmax(logits.double(), dim=1)
    best = expected.sort(dim=1, descending=True, stable=True)
    for scores in run_ranks(world_size, one_rank):
        own = expected.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(scores.logprobs.double(), own, atol=2e-5, rtol=0)
        assert torch.equal(scores.top_ids.long(), best.indices[:, :20])
        values = best.values[:, :20]
        torch.testing.assert_close(scores.top_logprobs.double(), values, atol=2e-5, rtol=0)
    assert most <= 32
