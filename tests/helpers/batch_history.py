"""A batch and the rank that runs its commands, in one process and without sockets."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from coordinator.batch import Batch
from coordinator.batch_limits import BatchLimits
from coordinator.request import Request, Sampling
from protos.lockstep.v1 import worker_pb2
from tests.helpers.fake_tables import FLAG_NOT_FINITE, FakeTables
from tests.helpers.fake_worker import FakeSettings

BLOCK_SIZE = 4


def make_request(
    order: int,
    prompt: Sequence[int],
    max_tokens: int,
    stop_ids: tuple[int, ...] = (),
    repetition_penalty: float = 1.0,
    use_prefix_cache: bool = False,
    **fields: Any,
) -> Request:
    """A greedy request of frontend 0 whose handle and name are its order."""
    sampling = Sampling(0.0, 0, 1.0, 0.0, 7, repetition_penalty, 0.0, 0.0, 0, stop_ids, -1)
    prompt_ids = np.array(prompt, dtype=np.int32)
    request = Request(order, 0, order, str(order), prompt_ids, max_tokens, sampling, 0.0)
    request.use_prefix_cache = use_prefix_cache
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def make_batch(
    num_blocks: int = 12,
    max_num_seqs: int = 4,
    seed: int = 0,
    max_batch_tokens: int = 12,
    use_prefix_cache: bool = True,
) -> Batch:
    """A small batch whose blocks are given out in a shuffled order."""
    order = np.random.default_rng(seed).permutation(np.arange(1, num_blocks)).tolist()
    limits = BatchLimits(num_blocks, BLOCK_SIZE, max_num_seqs, max_batch_tokens, use_prefix_cache)
    return Batch(1, limits, order)


class Rank:
    """Runs commands as the fake worker does; `deltas` are those that it was sent."""

    def __init__(self, batch: Batch, **settings: Any) -> None:
        config = worker_pb2.EngineConfig(
            max_num_seqs=batch.limits.max_num_seqs, block_size=BLOCK_SIZE, max_model_len=10**6
        )
        self.tables = FakeTables(FakeSettings(**settings), config, batch.limits.num_blocks)
        self.deltas: list[worker_pb2.TableDelta] = []

    @property
    def num_computed_prompt_tokens(self) -> int:
        """Tokens of all chunks so far."""
        return sum(len(delta.chunk_token_ids) // 4 for delta in self.deltas)

    def run(self, packed: bytes) -> list[worker_pb2.StepResult]:
        """The results of a command's steps; the command must carry a table digest."""
        command = worker_pb2.ExecuteRequest.FromString(packed).command
        delta = worker_pb2.TableDelta.FromString(command.delta)
        self.tables.apply(delta)
        assert command.table_digest == self.tables.digest()
        self.deltas.append(delta)
        return [report.result for report in self.tables.run(command, delta)]


def apply(batch: Batch, result: worker_pb2.StepResult) -> None:
    """What results.py does, without frontends."""
    token_ids = struct.unpack(f"<{len(result.token_ids) // 4}i", result.token_ids)
    scored = batch.outstanding.next_scored
    assert len(result.prompt_logprobs) == 4 * sum(count for _, _, count in scored)
    for request, start, count in scored:
        assert start + 1 <= request.num_scored, "log-probabilities of a prompt with a gap"
        request.num_scored = max(request.num_scored, start + 1 + count)
    entries = batch.resolve(result.command_id, result.step)
    for request, token_id, flags in zip(entries, token_ids, result.flags, strict=True):
        if request.is_finished:
            continue
        if flags & FLAG_NOT_FINITE:
            batch.prefix_cache.distrust(request)
            batch.finish(request)
            continue
        if token_id < 0:
            assert request.constraint is not None, "a live row was inert"
            continue
        request.output_ids.append(token_id)
        if flags or len(request.output_ids) == request.max_tokens:
            batch.finish(request)


def run_all(batch: Batch, rank: Rank, max_steps: int = 1) -> None:
    """Sends and applies until nothing is left to plan."""
    for _ in range(10_000):
        command = batch.next_command(with_table_digest=True, max_steps=max_steps)
        if command is None:
            return
        for result in rank.run(command):
            apply(batch, result)
        batch.check()
    raise AssertionError("the batch does not come to an end")
