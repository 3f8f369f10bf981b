"""Samples of one call wait until the prompt of the first is sent, and never longer."""

from typing import Any

import pytest

from coordinator.request import Request
from tests.helpers.batch_history import Rank, apply, make_batch, make_request, run_all
from tests.helpers.fake_worker import expected_output

PROMPT = list(range(10, 30))  # five blocks of four; two commands of twelve tokens


def make_group(count: int, **fields: Any) -> list[Request]:
    leader = make_request(0, PROMPT, 3, **fields)
    others = [make_request(order, PROMPT, 3, leader=leader, **fields) for order in range(1, count)]
    return [leader, *others]


@pytest.mark.parametrize("use_prefix_cache", [False, True])
@pytest.mark.parametrize("is_on", [False, True])
def test_samples_compute_their_prompt_once_whether_or_not_the_cache_is_on(
    use_prefix_cache: bool, is_on: bool
) -> None:
    batch = make_batch(num_blocks=40, use_prefix_cache=is_on)
    rank = Rank(batch)
    group = make_group(4, use_prefix_cache=use_prefix_cache)
    for request in group:
        batch.enqueue(request)
    assert (len(batch.queue), batch.num_waiting) == (1, 4)
    run_all(batch, rank)
    assert all(request.output_ids == expected_output(PROMPT, 3) for request in group)
    assert rank.num_computed_prompt_tokens == 20 + 3 * 4
    assert [request.num_cached_tokens for request in group] == [0, 16, 16, 16]


def test_a_group_that_may_not_share_with_others_does_not() -> None:
    batch = make_batch(num_blocks=40)
    rank = Rank(batch)
    stranger = make_request(9, PROMPT, 2, use_prefix_cache=True)
    for request in [*make_group(2), stranger]:
        batch.enqueue(request)
    run_all(batch, rank)
    assert stranger.num_cached_tokens == 0
    assert rank.num_computed_prompt_tokens == 20 + 4 + 20


def test_a_sample_that_comes_when_its_leader_runs_shares_at_once() -> None:
    batch = make_batch(num_blocks=40)
    rank = Rank(batch)
    leader, late = make_group(2)
    leader.max_tokens = 9
    batch.enqueue(leader)
    for _ in range(3):
        command = batch.next_command(with_table_digest=True)
        assert command is not None
        for result in rank.run(command):
            apply(batch, result)
    batch.enqueue(late)
    assert len(batch.queue) == 1
    run_all(batch, rank)
    assert late.num_cached_tokens == 16


def test_samples_do_not_wait_for_a_leader_that_has_ended() -> None:
    batch = make_batch(num_blocks=40)
    rank = Rank(batch)
    leader, *others = make_group(3)
    for request in [leader, *others]:
        batch.enqueue(request)
    batch.finish(leader)
    assert len(batch.queue) == 2
    run_all(batch, rank)
    assert all(request.output_ids == expected_output(PROMPT, 3) for request in others)
    after = make_request(7, PROMPT, 1, leader=leader)
    batch.enqueue(after)
    assert len(batch.queue) == 1


def test_a_sample_may_end_while_it_waits_for_its_leader() -> None:
    batch = make_batch(num_blocks=40)
    rank = Rank(batch)
    leader, gone, other = make_group(3)
    for request in (leader, gone, other):
        batch.enqueue(request)
    batch.finish(gone)
    assert batch.num_waiting == 2
    run_all(batch, rank)
    assert gone.output_ids == [] and other.is_finished
    assert batch.num_waiting == 0
