"""The states of a request and the ways between them."""

import itertools

import numpy as np
import pytest

from coordinator.request import _LEGAL, Request, RequestState, Sampling

SAMPLING = Sampling(0.0, 0, 1.0, 0.0, 7, 1.0, 0.0, 0.0, 0, (), -1)


def make_request(prompt_len: int = 5, max_tokens: int = 4) -> Request:
    prompt = np.arange(10, 10 + prompt_len, dtype=np.int32)
    return Request(1, 0, 1, "name", prompt, max_tokens, SAMPLING, 0.0)


def prefilled() -> Request:
    request = make_request()
    request.open_slot(3)
    request.num_prefilled = request.prefill_len
    return request


def test_the_last_output_token_needs_no_position_of_its_own() -> None:
    assert make_request(5, 4).final_limit == 8
    assert make_request(5, 1).final_limit == 5


def test_a_request_goes_from_the_queue_to_its_end() -> None:
    request = prefilled()
    request.start_decoding(0)
    request.complete()
    assert (request.slot, request.row) == (0, -1)
    request.finish()
    assert request.is_finished


def test_a_preempted_request_prefills_its_output_too() -> None:
    request = prefilled()
    request.start_decoding(2)
    request.output_ids += [91, 92]
    request.preempt(last_sent_step=17)
    assert (request.ready_after_step, request.slot, request.row) == (17, 0, -1)
    request.open_slot(4)
    assert (request.prefill_len, request.num_prefilled) == (7, 0)
    assert request.tokens_from(0, 7).tolist() == [10, 11, 12, 13, 14, 91, 92]
    assert request.tokens_from(3, 3).tolist() == [13, 14, 91]
    assert request.tokens_from(6, 1).tolist() == [92]
    assert request.tokens_from(0, 5).tolist() == [10, 11, 12, 13, 14]


def test_decoding_begins_only_after_the_last_chunk() -> None:
    request = make_request()
    request.open_slot(3)
    with pytest.raises(AssertionError):
        request.start_decoding(0)


def test_a_place_is_not_left_with_blocks() -> None:
    request = prefilled()
    request.block_ids = [1]
    with pytest.raises(AssertionError, match="released first"):
        request.finish()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (before, after)
        for before, after in itertools.product(RequestState, RequestState)
        if after not in _LEGAL[before]
    ],
)
def test_every_other_transition_is_our_bug(before: RequestState, after: RequestState) -> None:
    request = make_request()
    request.state = before
    moves = {
        RequestState.PREFILLING: lambda: request.open_slot(1),
        RequestState.RUNNING: lambda: request.start_decoding(0),
        RequestState.COMPLETING: request.complete,
        RequestState.PREEMPTED: lambda: request.preempt(1),
        RequestState.FINISHED: request.finish,
    }
    if after in moves:
        with pytest.raises(AssertionError):
            moves[after]()
        assert request.state is before


def test_finished_is_final_and_waiting_is_never_entered() -> None:
    assert not _LEGAL[RequestState.FINISHED]
    assert all(RequestState.WAITING not in ways for ways in _LEGAL.values())
