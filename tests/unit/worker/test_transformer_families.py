"""Every family against transformers, at every TP degree, prefilled, chunked and decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.load_ranks import load_rank
from tests.helpers.paged_steps import (
    PagedBatches,
    PoisonedCache,
    logits_of_steps,
    staggered_steps,
)
from tests.helpers.thread_comm import ThreadCommunicator, run_ranks
from tests.helpers.tiny_models import TINY_MODELS, write_tiny_model
from worker.models.transformer import Transformer

# Logits spread over several units; float32 sums in another order differ by some 1e-6 of that.
TOLERANCE = 3e-5
LENGTHS = [37, 22, 14]
PROMPT_LENGTHS = [33, 20, 5]


def full_logits(ranks: list[tuple[Transformer, list[Tensor]]], sequence: int) -> Tensor:
    """The ranks' vocabulary shards side by side, after a look at the padding."""
    parts = []
    for model, logits in ranks:
        num_real = model.shard.num_local_vocab
        assert torch.all(logits[sequence][:, num_real:] == -torch.inf)
        parts.append(logits[sequence][:, :num_real])
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module", params=sorted(TINY_MODELS))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, ...]], list[Tensor]]:
    """(folder, sequences, transformers' logits of each)."""
    model_dir = tmp_path_factory.mktemp(request.param)
    reference = write_tiny_model(model_dir, request.param)
    generator = torch.Generator().manual_seed(1)
    vocab_size = reference.config.vocab_size
    ids = [torch.randint(vocab_size, (length,), generator=generator) for length in LENGTHS]
    with torch.inference_mode():
        logits = [reference(tokens[None]).logits[0] for tokens in ids]
    return model_dir, [tuple(tokens.tolist()) for tokens in ids], logits


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_logits_equal_transformers(
    checkpoint: tuple[Path, list[tuple[int, ...]], list[Tensor]], world_size: int
) -> None:
    model_dir, sequences, expected = checkpoint
    assert all(logits.std() > 0.5 for logits in expected)
    # The chunk size and block size in one sweep: every degree sees both block sizes.
    sweeps = [(64, 16), (7, 16), (16, 1)]

    def run_rank(comm: ThreadCommunicator) -> list[tuple[Transformer, list[Tensor]]]:
        model = load_rank(model_dir, comm)
        results = []
        for seed, (chunk_size, block_size) in enumerate(sweeps):
            batches = PagedBatches.create(tuple(sequences), block_size, seed)
            cache = PoisonedCache(
                model.spec, model.shard, batches.num_blocks, block_size, torch.float32
            )
            steps = staggered_steps(LENGTHS, PROMPT_LENGTHS, chunk_size)
            results.append((model, logits_of_steps(model, batches, steps, cache)))
        return results

    by_rank = run_ranks(world_size, run_rank)
    for sweep in range(len(sweeps)):
        ranks = [results[sweep] for results in by_rank]
        for sequence, logits in enumerate(expected):
            ours = full_logits(ranks, sequence)
            torch.testing.assert_close(ours, logits, atol=TOLERANCE, rtol=TOLERANCE)
            assert torch.equal(ours.argmax(dim=1), logits.argmax(dim=1))
