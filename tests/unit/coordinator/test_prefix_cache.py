"""Who shares which blocks, and who does not. The rank proves that shared blocks hold the prefix."""

from typing import Any

import numpy as np
import pytest

from coordinator.prefix_keys import PrefixKeys
from coordinator.request import Request, RequestState
from tests.helpers.batch_history import Rank, apply, make_batch, make_request, run_all
from tests.helpers.fake_worker import expected_output

PROMPT = list(range(10, 23))  # three full blocks of four and one token


def shared(order: int, prompt: list[int], max_tokens: int = 2, **fields: Any) -> Request:
    return make_request(order, prompt, max_tokens, use_prefix_cache=True, **fields)


def run_after(first: Request, second: Request, use_prefix_cache: bool = True) -> Rank:
    """Runs one request after another; returns the rank. Outputs are checked."""
    batch = make_batch(use_prefix_cache=use_prefix_cache)
    rank = Rank(batch)
    for request in (first, second):
        batch.enqueue(request)
        run_all(batch, rank)
        prompt = request.prompt_ids.tolist()
        assert request.output_ids == expected_output(prompt, request.max_tokens)
    return rank


def test_a_prompt_seen_before_is_computed_only_past_its_full_blocks() -> None:
    second = shared(2, PROMPT)
    rank = run_after(shared(1, PROMPT), second)
    assert second.num_cached_tokens == 12
    assert rank.num_computed_prompt_tokens == 13 + 1
    (opened,) = rank.deltas[-2].opened_slots
    assert (opened.cached_len, opened.cached_token_ids) == (12, b"")


def test_a_full_hit_computes_the_last_block_so_that_there_are_logits() -> None:
    second = shared(2, PROMPT[:12])
    run_after(shared(1, PROMPT[:12]), second)
    assert second.num_cached_tokens == 8


def test_the_next_turn_of_a_conversation_finds_the_answer_of_the_last() -> None:
    answer = expected_output(PROMPT, 12)
    second = shared(2, PROMPT + answer + [1, 2, 3])
    run_after(shared(1, PROMPT, 12), second)
    # Of 25 tokens the last was never computed; what was unreported when the slot closed is lost.
    assert second.num_cached_tokens >= 20


def test_the_position_of_a_stop_token_is_never_taken_for_computed() -> None:
    answer = expected_output(PROMPT, 3)
    first = shared(1, PROMPT, 9, stop_ids=(answer[-1],))
    second = shared(2, PROMPT + answer + [1, 2, 3])  # the stop token would end the fourth block
    batch = make_batch()
    rank = Rank(batch)
    for request in (first, second):
        batch.enqueue(request)
        run_all(batch, rank)
    assert (first.output_ids, second.num_cached_tokens) == (answer, 12)


@pytest.mark.parametrize(
    ("first", "second", "use_prefix_cache"),
    [
        ({}, {"tenant": "other"}, True),
        ({"use_prefix_cache": False}, {}, True),
        ({}, {"use_prefix_cache": False}, True),
        ({}, {}, False),
    ],
    ids=["another tenant", "the first opted out", "the second opted out", "off"],
)
def test_nothing_is_shared(
    first: dict[str, object], second: dict[str, object], use_prefix_cache: bool
) -> None:
    later = shared(2, PROMPT)
    for name, value in second.items():
        setattr(later, name, value)
    earlier = shared(1, PROMPT)
    for name, value in first.items():
        setattr(earlier, name, value)
    rank = run_after(earlier, later, use_prefix_cache)
    assert later.num_cached_tokens == 0
    assert rank.num_computed_prompt_tokens == 26


def test_a_prompt_block_is_shared_once_the_command_that_fills_it_is_sent() -> None:
    batch = make_batch(num_blocks=20)
    rank = Rank(batch)
    together = [shared(1, PROMPT[:5]), shared(2, PROMPT[:5])]  # in one command: neither sees it
    later = shared(3, PROMPT[:5])
    for request in together:
        batch.enqueue(request)
    first = batch.next_command(with_table_digest=True)
    batch.enqueue(later)
    second = batch.next_command(with_table_digest=True)
    assert first is not None and second is not None
    assert [request.cached_len for request in [*together, later]] == [0, 0, 4]
    assert batch.last_reported_step == 0
    for result in [*rank.run(first), *rank.run(second)]:
        apply(batch, result)
    run_all(batch, rank)
    assert batch.prefix_cache.take_counts() == (15, 4)


def test_penalties_get_the_token_ids_that_were_not_sent_as_chunks() -> None:
    second = shared(2, PROMPT, repetition_penalty=1.5)
    rank = run_after(shared(1, PROMPT), second)
    (opened,) = rank.deltas[-2].opened_slots
    assert np.frombuffer(opened.cached_token_ids, "<i4").tolist() == PROMPT[:12]


def test_a_preempted_request_takes_over_its_own_old_blocks() -> None:
    batch = make_batch(num_blocks=9)
    rank = Rank(batch)
    old, young = shared(1, [1] * 5, 20), shared(2, [2] * 9, 20)
    for request in (old, young):
        batch.enqueue(request)
    for _ in range(100):
        if young.state is RequestState.PREEMPTED:
            break
        command = batch.next_command(with_table_digest=True)
        assert command is not None
        for result in rank.run(command):
            apply(batch, result)
    assert young.state is RequestState.PREEMPTED
    batch.finish(old)
    run_all(batch, rank)
    assert young.cached_len >= 8 and young.num_cached_tokens == 0
    assert young.output_ids == expected_output([2] * 9, 20)


def test_what_gave_logits_that_are_not_finite_is_not_shared() -> None:
    batch = make_batch()
    bad = expected_output(PROMPT, 3)[2]
    rank = Rank(batch, not_finite_token=bad)
    batch.enqueue(shared(1, PROMPT, 9))
    run_all(batch, rank)
    assert batch.allocator.num_kept_blocks == 0


def test_blocks_that_nobody_owns_are_given_out_when_none_is_free_the_oldest_tail_first() -> None:
    batch = make_batch(num_blocks=9)
    rank = Rank(batch)
    for order, first_id in ((1, 100), (2, 200)):
        batch.enqueue(shared(order, list(range(first_id, first_id + 13)), 1))
        run_all(batch, rank)
    assert batch.allocator.num_kept_blocks == 6 and batch.kv_usage == 0
    batch.enqueue(shared(3, list(range(300, 313)), 1))  # two free, two more from request 1
    run_all(batch, rank)
    again = [shared(4, list(range(100, 113)), 1), shared(5, list(range(200, 213)), 1)]
    for request in again:
        batch.prefix_cache.enrol(request)
    assert [len(batch.prefix_cache.find(request)) for request in again] == [1, 3]


def test_keys_depend_on_salt_and_every_token_before_and_are_made_once() -> None:
    def keys(salt: bytes, token_ids: list[int]) -> list[bytes]:
        made = PrefixKeys(salt)
        array = np.array(token_ids, dtype=np.int32)
        for num_blocks in range(len(token_ids) // 4 + 1):
            made.extend(lambda start, length: array[start : start + length], num_blocks, 4)
        return made.keys

    base = keys(b"a", PROMPT)
    assert len(base) == len(set(base)) == 3
    assert keys(b"a", [*PROMPT[:8], 0, 0, 0, 0])[:2] == base[:2]
    assert not set(keys(b"b", PROMPT)) & set(base)
    assert not set(keys(b"a", [99, *PROMPT[1:]])) & set(base)
    # Ids whose bytes would run together without a fixed width.
    assert keys(b"a", [1, 256, 0, 0]) != keys(b"a", [256, 1, 0, 0])
