"""What a constrained row costs the others: nothing but its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lockstep.client import ids_request
from protos.lockstep.v1 import generate_pb2
from tests.helpers.served_group import ServedGroup, value_of
from tests.integration.test_batching import Stream, with_stub
from tests.unit.coordinator.grammar.small_grammar import write_model

pytestmark = pytest.mark.timeout(240)
_NUM_FREE = 31
_NUM_TOKENS = 400
_MAX_PAIRS = 6  # on a busy machine streams begin late, and a run takes more steps than it must
_LETTERS = "[a-z]{2000}"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    model = write_model(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("simulated")
    with ServedGroup(model, folder, "--tp", "2", "--step-ms", "2", subcommand="simulate") as group:
        yield group


def free_request(index: int) -> generate_pb2.GenerateRequest:
    return ids_request([index + 1] * 8, max_tokens=_NUM_TOKENS, seed=index, ignore_eos=True)


async def _run(stub: Any, is_with_constrained: bool) -> tuple[float, int]:
    """Seconds that the free streams took, and tokens that the constrained one got meanwhile."""
    bound = None
    if is_with_constrained:
        bound = Stream(stub, ids_request([5, 6], max_tokens=1900, regex=_LETTERS, seed=1))
        await bound.received(1)
    begun = time.monotonic()
    streams = [Stream(stub, free_request(index)) for index in range(_NUM_FREE)]
    await asyncio.gather(*(stream.ended for stream in streams))
    seconds = time.monotonic() - begun
    assert all(len(stream.ids) == _NUM_TOKENS for stream in streams)
    if bound is None:
        return seconds, 0
    num_tokens = len(bound.ids)
    bound.call.cancel()
    await bound.ended
    return seconds, num_tokens


def test_free_rows_take_no_more_steps_beside_a_constrained_row(group: ServedGroup) -> None:
    """By steps, so that neighbours on the machine do not count; the times are shown."""
    fewest = {False: 10**9, True: 10**9}
    with_stub(group, lambda stub: _run(stub, True))  # the grammar process comes up
    for _ in range(_MAX_PAIRS):
        for is_with_constrained in (False, True):
            before = value_of(group.metrics, "lockstep_steps_total")

            async def script(stub: Any, bound: bool = is_with_constrained) -> tuple[float, int]:
                return await _run(stub, bound)

            seconds, num_bound = with_stub(group, script)
            num_steps = int(value_of(group.metrics, "lockstep_steps_total") - before)
            print(f"{is_with_constrained=}: {num_steps} steps, {seconds:.3f} s, {num_bound} tokens")
            assert not is_with_constrained or num_bound > _NUM_TOKENS / 10
            fewest[is_with_constrained] = min(fewest[is_with_constrained], num_steps)
        if fewest[True] <= 1.05 * fewest[False]:
            return
    raise AssertionError(f"steps without and with a constrained row: {fewest}")
