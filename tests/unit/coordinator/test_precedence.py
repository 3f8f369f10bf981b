"""Urgent requests go on at the cost of others, and yet everyone gets to its end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.batch import Batch
from coordinator.batch_limits import BatchLimits
from coordinator.precedence import Precedence, virtual_arrival
from coordinator.request import Request, Sampling

SAMPLING = Sampling(0.0, 0, 1.0, 0.0, 7, 1.0, 0.0, 0.0, 0, (), -1)


def make_request(order: int, prompt_len: int, max_tokens: int) -> Request:
    prompt_ids = np.zeros(prompt_len, dtype=np.int32)
    return Request(order, 0, order, str(order), prompt_ids, max_tokens, SAMPLING, 0.0)


class Engine:
    """A batch with a cache of 6 blocks of 4 tokens, whose ranks answer every command at once."""

    def __init__(self) -> None:
        self.batch = Batch(1, BatchLimits(7, 4, 3, 12))
        self.num_preemptions = 0

    def step(self) -> None:
        batch = self.batch
        held = sorted(batch._active)
        if batch.next_command() is None:
            return
        lost = [request.order for request in batch.queue if request.order in held]
        self.num_preemptions += len(lost)
        assert not lost or held[0] not in lost, "the first by precedence lost its place"
        for step in range(batch.last_reported_step + 1, batch.last_step + 1):
            for request in batch.resolve(batch.last_command_id, step):
                if not request.is_finished:
                    request.output_ids.append(0)
                    if len(request.output_ids) == request.max_tokens:
                        batch.finish(request)
        batch.check()


@settings(deadline=None, max_examples=50)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(-3, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 20)),
        min_size=1,
        max_size=25,
    )
)
def test_every_request_ends_whatever_the_priorities(
    arrivals: list[tuple[int, int, int, int]],
) -> None:
    engine, precedence, requests = Engine(), Precedence(), []
    for second, (priority, prompt_len, max_tokens, num_steps) in enumerate(arrivals):
        order = precedence.take(virtual_arrival(float(second), priority))
        requests.append(make_request(order, prompt_len, max_tokens))
        engine.batch.enqueue(requests[-1])
        for _ in range(num_steps):
            engine.step()
    for _ in range(3000):
        if all(request.is_finished for request in requests):
            break
        engine.step()
    assert all(request.is_finished for request in requests)


def serve_beside_urgent_requests(engine: Engine) -> Request:
    """Serves a request beside others that are more urgent for as long as they arrive soon after."""
    precedence = Precedence()
    patient = make_request(precedence.take(virtual_arrival(0.5, 0)), 4, 17)
    engine.batch.enqueue(patient)
    for second in range(400):
        if len(engine.batch.queue) < 2:
            order = precedence.take(virtual_arrival(float(second), -3))
            engine.batch.enqueue(make_request(order, 4, 12))
        for _ in range(3):
            engine.step()
    return patient


def test_a_stream_of_urgent_requests_preempts_others_but_not_for_ever() -> None:
    engine = Engine()
    assert serve_beside_urgent_requests(engine).is_finished
    assert engine.num_preemptions > 0


def test_taking_the_place_of_the_first_by_precedence_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victims = Batch._victims
    monkeypatch.setattr(Batch, "_victims", lambda batch: iter([*victims(batch)][::-1]))
    with pytest.raises(AssertionError, match="lost its place|does not fit alone"):
        serve_beside_urgent_requests(Engine())


def test_orders_are_unique_though_arrivals_are_not_and_are_free_again_afterwards() -> None:
    precedence = Precedence()
    same = [precedence.take(virtual_arrival(7.0, 0)) for _ in range(16)]
    assert sorted(set(same)) == same
    assert precedence.take(virtual_arrival(17.0, -1)) == same[-1] + 1
    precedence.give_back(same[0])
    assert precedence.take(same[0]) == same[0]
