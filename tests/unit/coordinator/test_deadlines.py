"""Requests whose deadline has passed are found, once, and the others leave no trace."""

from coordinator.deadlines import Deadlines
from coordinator.request import Request
from tests.unit.coordinator.test_request_queue import make_request


def due(order: int, deadline: float) -> Request:
    request = make_request(order)
    request.deadline = deadline
    return request


def test_each_passed_deadline_ends_its_request_once_and_in_order() -> None:
    deadlines, ended = Deadlines(), list[int]()
    finished = due(4, 1.0)
    for request in (due(1, 3.0), due(2, 2.0), due(3, 0.0), finished, due(5, 9.0)):
        deadlines.add(request)
    finished.finish()

    def end(request: Request) -> None:
        ended.append(request.order)
        request.finish()

    assert not deadlines.end_passed(2.0, 4, end) and ended == []
    assert deadlines.end_passed(5.0, 4, end) and ended == [2, 1]
    assert not deadlines.end_passed(5.0, 2, end)
    assert len(deadlines) == 1


def test_requests_with_one_deadline_end_together_whatever_their_order() -> None:
    # The order of a request that has ended may be given to another.
    deadlines = Deadlines()
    same = [due(1, 3.0), due(1, 3.0)]
    for request in same:
        deadlines.add(request)
    assert deadlines.end_passed(4.0, 2, Request.finish)
    assert all(request.is_finished for request in same)


def test_requests_that_ended_long_before_their_deadline_do_not_pile_up() -> None:
    deadlines = Deadlines()
    running = due(0, 1e6)
    deadlines.add(running)
    for order in range(1, 10_000):
        request = due(order, 1e6)
        deadlines.add(request)
        request.finish()
        deadlines.end_passed(float(order), 1, Request.finish)
        assert len(deadlines) <= 68
    assert not running.is_finished
    assert deadlines.end_passed(2e6, 1, Request.finish) and running.is_finished
