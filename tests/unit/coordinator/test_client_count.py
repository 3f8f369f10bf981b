"""What a frontend reports against what the engine has, with messages on their way."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from coordinator.client_count import ClientCount


@given(
    moves=st.lists(
        st.sampled_from(["submit", "release", "end", "to_engine", "to_frontend", "report"]),
        max_size=80,
    ),
    num_lost=st.integers(0, 2),
)
def test_only_requests_that_the_frontend_lost_count_whatever_is_in_flight(
    moves: list[str], num_lost: int
) -> None:
    count = ClientCount()
    held, in_engine = set[int](), set[int]()
    up, down = deque[tuple[str, int]](), deque[int]()
    number = excess = 0

    def to_engine() -> None:
        nonlocal excess
        kind, handle = up.popleft()
        if kind == "submit":
            in_engine.add(handle)
            count.began(0)
        elif kind == "release" and handle in in_engine:
            in_engine.remove(handle)
            count.ended(0)
        elif kind == "report":
            excess = count.reported(0, handle)

    for move in moves:
        if move == "submit":
            number += 1
            held.add(number)
            up.append((move, number))
        elif move == "release" and held:
            up.append((move, held.pop()))
        elif move == "end" and in_engine:
            down.append(in_engine.pop())
            count.ended(0)
        elif move == "to_engine" and up:
            to_engine()
        elif move == "to_frontend" and down:
            held.discard(down.popleft())
        elif move == "report":
            up.append((move, len(held)))
        assert excess == 0
    # The fault: the frontend forgets streams without a Release.
    lost = [held.pop() for _ in range(min(num_lost, len(held)))]
    while down:
        handle = down.popleft()
        held.discard(handle)
        lost = [one for one in lost if one != handle]
    up.append(("report", len(held)))
    while up:
        to_engine()
    assert excess == len(lost)


def test_every_frontend_counts_for_itself() -> None:
    count = ClientCount()
    for frontend in (0, 1, 1):
        count.began(frontend)
    assert count.reported(0, 5) == 0
    assert count.reported(1, 0) == 2
    assert count.reported(0, 0) == 3
    count.ended(1)
    assert count.reported(1, 1) == 1
    assert count.reported(0, 1) == 0
