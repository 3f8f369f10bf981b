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
from coordinator.results import apply_result, resolve_result
from protos.lockstep.v1 import worker_pb2
from tests.helpers.engine_harness import NoMasks, make_submit


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
        apply_result(resolve_result(result, batch), batch, book, metrics, now=10.0)
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
