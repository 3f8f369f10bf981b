"""A result that does not fit what was sent is the rank's fault, not a request's."""

import asyncio
import struct

import pytest

from coordinator.admission import ModelLimits
from coordinator.admission_control import QueueLimits
from coordinator.batch import Batch
from coordinator.batch_limits import BatchLimits
from coordinator.constraints import Constraints
from coordinator.errors import ProtocolBroken
from coordinator.metrics import EngineMetrics
from coordinator.outbox import Outbox
from coordinator.request_book import RequestBook
from coordinator.results import apply_results, resolve_result
from protos.lockstep.v1 import worker_pb2
from tests.helpers.batch_history import Rank
from tests.helpers.engine_harness import Heard, NoMasks, make_submit
from tests.helpers.fake_worker import expected_output


def apply(change: dict[str, object]) -> list[object]:
    """One request with logprobs, one step; returns what its frontend hears."""

    async def run() -> list[object]:
        batch = Batch(1, BatchLimits(9, 4, 2, 8))
        outbox, metrics = Outbox(), EngineMetrics("m")
        book = RequestBook(outbox, metrics, QueueLimits(9), Constraints(NoMasks()))
        book.open(batch, ModelLimits(32, 1000, 9, 4))
        book.submit(0, make_submit(1, [1, 2], 5, logprobs=1))
        outbox.take()
        assert batch.next_command()
        values: dict[str, object] = {
            "command_id": 1,
            "step": 1,
            "token_ids": struct.pack("<i", 77),
            "flags": b"\0",
            "logprobs": struct.pack("<f", -0.25),
            "top_token_ids": struct.pack("<20i", *range(20)),
            "top_logprobs": struct.pack("<20f", *[-1.0] * 20),
        }
        result = worker_pb2.StepResult(**(values | change))  # type: ignore[arg-type]
        apply_results([(resolve_result(result, batch), 10.0)], batch, book, metrics)
        return list(outbox.take()[0])

    return asyncio.run(run())


def test_a_fitting_result_reaches_the_frontend() -> None:
    (message,) = apply({})
    outputs = message.outputs  # type: ignore[attr-defined]
    assert struct.unpack("<i", outputs.token_ids) == (77,)
    assert list(outputs.logprobs[0].top_token_ids) == [0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"command_id": 2}, "awaited: command 1 step 1"),
        ({"step": 2}, "awaited: command 1 step 1"),
        ({"token_ids": b""}, "0 tokens and 1 flags for 1 entries"),
        ({"flags": b"\0\0"}, "1 tokens and 2 flags for 1 entries"),
        ({"token_ids": struct.pack("<i", -1)}, "gave request 'request-1' no token"),
        ({"logprobs": struct.pack("<2f", 0, 0)}, "log-probabilities do not fit"),
        ({"top_logprobs": b""}, "log-probabilities do not fit"),
        (
            {"top_logprobs": bytes(8), "top_token_ids": bytes(8)},
            "2 alternatives, not",
        ),
    ],
)
def test_a_result_that_does_not_fit_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ProtocolBroken, match=words):
        apply(change)


def history(together: bool) -> tuple[dict[int, list[int]], list[int], EngineMetrics]:
    """Tokens by handle, who ended in what order, and the measures, of grants of several steps.

    A result is applied with those of its command, or by itself.
    """

    async def run() -> tuple[dict[int, list[int]], list[int], EngineMetrics]:
        batch = Batch(1, BatchLimits(200, 4, 4, 16))
        outbox, metrics, heard = Outbox(), EngineMetrics("m"), Heard()
        book = RequestBook(outbox, metrics, QueueLimits(9), Constraints(NoMasks()))
        book.open(batch, ModelLimits(64, 1000, 200, 4))
        for handle, max_tokens in ((1, 9), (2, 5), (3, 14), (4, 2), (5, 8), (6, 1), (7, 6)):
            book.submit(0, make_submit(handle, [handle] * 3, max_tokens))
        rank, step = Rank(batch), 0
        while (command := batch.next_command(with_table_digest=True, max_steps=4)) is not None:
            come = []
            for result in rank.run(command):
                step += 1
                come.append((resolve_result(result, batch), 10.0 + batch.last_command_id))
            for some in [come] if together else [[one] for one in come]:
                apply_results(some, batch, book, metrics)
            for message in outbox.take()[0]:
                heard.hear(message)
        assert metrics.steps == step
        return heard.tokens, list(heard.ended), metrics

    return asyncio.run(run())


def test_results_of_a_command_give_together_what_each_gives_by_itself() -> None:
    tokens, ended, metrics = history(together=True)
    wanted, ended_apart, metrics_apart = history(together=False)
    assert tokens == wanted == {h: expected_output([h] * 3, len(wanted[h])) for h in range(1, 8)}
    assert [len(wanted[handle]) for handle in range(1, 8)] == [9, 5, 14, 2, 8, 1, 6]
    assert sorted(ended) == sorted(ended_apart)
    assert metrics.generation_tokens == metrics_apart.generation_tokens
    for name in ("time_to_first_token", "inter_token_latency"):
        counts = [getattr(one, name).cumulative() for one in (metrics, metrics_apart)]
        assert counts[0][-1][1] == counts[1][-1][1]


def test_a_row_that_stops_short_of_its_limit_without_a_word_is_the_ranks_fault() -> None:
    async def run() -> None:
        batch = Batch(1, BatchLimits(200, 4, 2, 16))
        outbox, metrics = Outbox(), EngineMetrics("m")
        book = RequestBook(outbox, metrics, QueueLimits(9), Constraints(NoMasks()))
        book.open(batch, ModelLimits(64, 1000, 200, 4))
        book.submit(0, make_submit(1, [1], 9))
        rank = Rank(batch)
        for _ in range(2):
            command = batch.next_command(with_table_digest=True, max_steps=4)
            assert command is not None
            results = rank.run(command)
            if len(results) > 1:
                results[-1].token_ids = struct.pack("<i", -1)
            come = [(resolve_result(result, batch), 10.0) for result in results]
            apply_results(come, batch, book, metrics)

    with pytest.raises(ProtocolBroken, match="step 5 gave request 'request-1' no token"):
        asyncio.run(run())
