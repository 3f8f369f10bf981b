"""Times of a request from what was reported between its first chunk and its end."""

import pytest

from coordinator.metrics import EngineMetrics
from coordinator.time_keeper import TimeKeeper
from tests.unit.coordinator.test_request_queue import make_request


def test_times_are_those_between_arrival_first_chunk_first_token_and_end() -> None:
    metrics = EngineMetrics("m")
    keeper = TimeKeeper(77, metrics)
    request = make_request(1)
    request.arrival_time = 100.0
    keeper.began(request, 102.0)
    request.first_token_time = 105.0
    request.output_ids += [1, 2, 3]
    request.num_resumed, request.num_partial_chunks = 1, 2
    request.num_preemptions, request.num_cached_tokens = 1, 3
    keeper.began(request, 107.0)  # again after a preemption: the first one counts
    times = keeper.ended(request, 112.0)
    assert (times.queue_seconds, times.prefill_seconds, times.decode_seconds) == (2.0, 3.0, 7.0)
    assert (times.step_count, times.preemption_count, times.cached_token_count) == (4, 1, 3)
    assert times.epoch == 77
    assert metrics.request_queue_time.sum == 2.0
    assert metrics.request_prefill_time.sum == 3.0
    assert metrics.request_decode_time.sum == 7.0


def test_who_never_left_the_queue_has_only_waited() -> None:
    metrics = EngineMetrics("m")
    request = make_request(1)
    request.arrival_time = 100.0
    times = TimeKeeper(1, metrics).ended(request, 109.0)
    assert (times.queue_seconds, times.prefill_seconds, times.decode_seconds) == (9.0, 0.0, 0.0)
    assert (times.step_count, times.comm_share) == (0, -1.0)
    assert metrics.request_queue_time.count == 0


def comm_share(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> float:
    keeper = TimeKeeper(1, EngineMetrics("m"))
    for step in before:
        keeper.step_reported(*step)
    request = make_request(1)
    keeper.began(request, 1.0)
    for step in after:
        keeper.step_reported(*step)
    return keeper.ended(request, 2.0).comm_share


def test_the_communication_share_is_that_of_the_steps_in_between() -> None:
    before = [(1000, 500_000), (1000, 501_000)]
    assert comm_share(before, [(1000, 501_250), (3000, 502_000)]) == pytest.approx(0.25)
    # The first report of an epoch tells where the count stands, not what is of this epoch.
    assert comm_share([], [(1000, 500_000), (1000, 500_100)]) == pytest.approx(0.1)


def test_the_communication_share_is_unknown_without_a_measurement() -> None:
    assert comm_share([(1000, -1)], [(1000, -1), (1000, -1)]) == -1.0
    assert comm_share([], [(1000, 5)]) == -1.0
