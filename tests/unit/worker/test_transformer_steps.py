"""What a step promises beyond right logits: asked rows, equal ranks, counted collectives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.load_ranks import load_rank
from tests.helpers.paged_steps import PagedBatches, Piece, PoisonedCache
from tests.helpers.thread_comm import ThreadCommunicator, run_ranks
from tests.helpers.tiny_models import write_tiny_model
from worker.models.transformer import Transformer

PROMPT = (5, 17, 250, 3, 99, 120, 4, 77, 9, 300, 41)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_model(folder, "llama")
    return folder


def prefill(model: Transformer, rows: list[int] | None) -> Tensor:
    batches = PagedBatches.create((PROMPT,), block_size=4)
    dtype = model.weights.embedding.dtype
    cache = PoisonedCache(model.spec, model.shard, batches.num_blocks, 4, dtype)
    asked = None if rows is None else torch.tensor(rows)
    batch = batches.batch([Piece(0, 0, len(PROMPT), False)], logit_rows=asked)
    return model.forward(batch, cache)


def test_only_asked_rows_come_back(model_dir: Path) -> None:
    def run_rank(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        model = load_rank(model_dir, comm)
        return prefill(model, None), prefill(model, [10, 2])

    for every, asked in run_ranks(2, run_rank):
        torch.testing.assert_close(asked, every[[10, 2]])


def test_ranks_have_the_same_bits_and_reduce_twice_a_layer(model_dir: Path) -> None:
    def run_rank(comm: ThreadCommunicator) -> tuple[Tensor, int]:
        hidden = prefill(load_rank(model_dir, comm), None)
        return hidden, comm.stats.all_reduce.calls

    results = run_ranks(3, run_rank)
    assert all(torch.equal(hidden, results[0][0]) for hidden, _ in results)
    assert [calls for _, calls in results] == [1 + 2 * 2] * 3


def greedy_tokens(model: Transformer, comm: ThreadCommunicator, num_tokens: int) -> list[int]:
    """Prefill, then decode; the winner is found over every rank's logits."""
    tokens = list(PROMPT)
    final = tuple(PROMPT) + (0,) * num_tokens
    batches = PagedBatches.create((final,), block_size=4, seed=3)
    cache = PoisonedCache(model.spec, model.shard, batches.num_blocks, 4, torch.float32)
    piece = Piece(0, 0, len(PROMPT), False)
    for _ in range(num_tokens):
        known = (*tokens, *final[len(tokens) :])
        batch = dataclasses.replace(batches, sequences=(known,)).batch(
            [piece], logit_rows=torch.tensor([piece.length - 1])
        )
        shards = comm.all_gather(model.local_logits(model.forward(batch, cache)))
        sizes = comm.all_gather(torch.tensor(model.shard.num_local_vocab)).tolist()
        logits = torch.cat([shards[rank, 0, :size] for rank, size in enumerate(sizes)])
        tokens.append(int(logits.argmax()))
        piece = Piece(0, len(tokens) - 1, 1, True)
    return tokens[len(PROMPT) :]


def test_greedy_tokens_equal_transformers_at_every_degree(tmp_path: Path) -> None:
    reference = write_tiny_model(tmp_path, "qwen3")
    expected = reference.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
    )[0, len(PROMPT) :].tolist()
    assert len(set(expected)) > 3
    for world_size in (1, 2, 3, 5):
        ranks = run_ranks(
            world_size, lambda comm: greedy_tokens(load_rank(tmp_path, comm), comm, 24)
        )
        assert ranks == [expected] * world_size


def test_bfloat16_stays_near_float32(model_dir: Path) -> None:
    def run_rank(comm: ThreadCommunicator) -> list[Tensor]:
        return [
            prefill(load_rank(model_dir, comm, dtype), None).float()
            for dtype in (torch.float32, torch.bfloat16)
        ]

    for exact, rounded in run_ranks(2, run_rank):
        similarity = torch.nn.functional.cosine_similarity(exact, rounded, dim=1)
        assert similarity.min() > 0.995


@pytest.mark.parametrize("fault", ["q_offset", "vocab_start", "weights"])
def test_planted_sharding_fault_is_seen_in_the_logits(model_dir: Path, fault: str) -> None:
    def run_rank(comm: ThreadCommunicator, planted: bool) -> Tensor:
        model = load_rank(model_dir, comm)
        if planted and comm.rank == 2:
            if fault == "weights":
                model.weights.layers[0].input_norm.zero_()
            else:
                wrong = {fault: getattr(model.shard, fault) - 1}
                model.shard = dataclasses.replace(model.shard, **wrong)
        return prefill(model, None)

    # At four ranks, rank 2 holds query heads of two groups: q_offset counts.
    sound = run_ranks(4, lambda comm: run_rank(comm, False))[0]
    broken = run_ranks(4, lambda comm: run_rank(comm, True))[0]
    assert not torch.allclose(sound, broken, atol=1e-3)
