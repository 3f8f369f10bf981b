"""Who gets a slot next: the preempted, then tenants by tokens, then precedence."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import request_queue
from coordinator.precedence import Precedence, virtual_arrival
from coordinator.request import Request, Sampling
from coordinator.request_queue import RequestQueue

GREEDY = Sampling(0.0, 0, 1.0, 0.0, 7, 1.0, 0.0, 0.0, 0, (), -1)


def make_request(order: int, tenant: str = "", prompt_len: int = 4, max_tokens: int = 4) -> Request:
    prompt_ids = np.zeros(prompt_len, dtype=np.int32)
    return Request(order, 0, order, str(order), prompt_ids, max_tokens, GREEDY, 0.0, tenant=tenant)


def take_all(queue: RequestQueue) -> list[int]:
    taken = []
    while len(queue):
        first = next(iter(queue)).order
        taken.append(queue.take(first).order)
    return taken


def test_one_tenant_is_served_by_order_and_the_preempted_before_all() -> None:
    queue = RequestQueue()
    for order in (5, 3, 9, 7):
        queue.append(make_request(order))
    late, later = make_request(8, prompt_len=2), make_request(6, "other", prompt_len=2)
    queue.put_back(late)
    queue.put_back(later)
    assert [request.order for request in queue] == [6, 8, 3, 5, 7, 9]
    assert (len(queue), queue.num_prompt_tokens, queue.num_tenants) == (6, 20, 1)
    assert take_all(queue) == [6, 8, 3, 5, 7, 9]
    assert (len(queue), queue.num_prompt_tokens, queue.num_tenants) == (0, 0, 0)


def test_taking_any_but_the_first_is_caught() -> None:
    queue = RequestQueue()
    queue.append(make_request(1))
    queue.append(make_request(2))
    with pytest.raises(AssertionError, match="request 2 is not first"):
        queue.take(2)


def test_removing_what_is_not_there_is_caught() -> None:
    queue = RequestQueue()
    queue.append(make_request(1))
    with pytest.raises(AssertionError, match="request 1 is not in the queue"):
        queue.remove(make_request(1))


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["append", "take", "take", "remove", "put_back", "charge"]),
        st.integers(0, 4),  # which tenant
        st.integers(1, 9),  # prompt tokens
        st.integers(0, 99),  # where, for the others
    ),
    max_size=80,
)


class History:
    """A queue moved at random, with a plain list of what must be in it."""

    def __init__(self) -> None:
        self.queue = RequestQueue()
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_arrived = 0

    def append(self, tenant: int, prompt_len: int, where: int) -> None:
        self.num_arrived += 1
        order = (where - 50) * 1000 + self.num_arrived
        request = make_request(order, f"tenant-{tenant}", prompt_len)
        self.waiting.append(request)
        self.queue.append(request)

    def take(self, tenant: int, prompt_len: int, where: int) -> None:
        expected = [request.order for request in self.queue][:3]
        taken = []
        for order in expected:
            request = self.queue.take(order)
            taken.append(request.order)
            self.waiting.remove(request)
            self.running.append(request)
        assert taken == expected

    def remove(self, tenant: int, prompt_len: int, where: int) -> None:
        if self.waiting:
            self.queue.remove(self.waiting.pop(where % len(self.waiting)))

    def put_back(self, tenant: int, prompt_len: int, where: int) -> None:
        if self.running:
            request = self.running.pop(where % len(self.running))
            self.waiting.append(request)
            self.queue.put_back(request)

    def charge(self, tenant: int, prompt_len: int, where: int) -> None:
        for request in self.running:
            request.output_ids += [0] * where
            self.queue.charge_output(request)

    def check(self) -> None:
        listed = [request.order for request in self.queue]
        assert listed == [request.order for request in self.queue], "iterating changed it"
        assert sorted(listed) == sorted(request.order for request in self.waiting)
        assert len(self.queue) == len(self.waiting)
        assert self.queue.num_prompt_tokens == sum(one.prompt_len for one in self.waiting)


@settings(deadline=None)
@given(moves=MOVES)
def test_the_order_shown_is_the_order_in_which_requests_are_taken(
    moves: list[tuple[str, int, int, int]],
) -> None:
    history = History()
    for move, *numbers in moves:
        getattr(history, move)(*numbers)
        history.check()
    shown = [request.order for request in history.queue]
    assert take_all(history.queue) == shown


class Server:
    """Two slots, each held for 10 steps; a step gives a token to each of them."""

    def __init__(self, tenant_of: Callable[[str], str] = lambda tenant: tenant) -> None:
        self.queue = RequestQueue()
        self.step = 0
        self.tokens: Counter[str] = Counter()  # weighted, by who asked
        self.longest_wait: Counter[str] = Counter()  # steps, by who asked
        self._tenant_of = tenant_of
        self._running: list[tuple[Request, int]] = []
        self._came: dict[int, int] = {}

    def arrive(self, tenant: str, count: int = 1) -> None:
        for _ in range(count):
            order = len(self._came)
            request = make_request(order, self._tenant_of(tenant), 30)
            request.request_id = tenant
            self._came[order] = self.step
            self.queue.append(request)

    def run(self, num_steps: int, tenant: str, period: int) -> None:
        """`tenant` sends a request every `period` steps."""
        for _ in range(num_steps):
            if self.step % period == 0:
                self.arrive(tenant)
            while len(self._running) < 2 and len(self.queue):
                request = self.queue.take(next(iter(self.queue)).order)
                waited = self.step - self._came[request.order]
                self.longest_wait[request.request_id] = max(
                    self.longest_wait[request.request_id], waited
                )
                self._running.append((request, self.step + 10))
                self.tokens[request.request_id] += request.prompt_len
            for request, _ in self._running:
                request.output_ids.append(0)
                self.queue.charge_output(request)
                self.tokens[request.request_id] += 2
            self.step += 1
            self._running = [(one, end) for one, end in self._running if end > self.step]


def test_a_flood_leaves_another_tenant_half_of_the_tokens() -> None:
    server = Server()
    server.arrive("flood", 400)
    server.run(100, "flood", 1)
    before = server.tokens.copy()
    server.run(500, "steady", 5)  # twice its share, so that it always waits
    flood = server.tokens["flood"] - before["flood"]
    assert abs(server.tokens["steady"] - flood) <= 100
    assert server.tokens["steady"] > 2000


@pytest.mark.parametrize(
    ("tenant_of", "is_fair"), [(lambda name: name, True), (lambda name: "", False)]
)
def test_who_stays_within_its_share_waits_for_one_slot_however_long_the_queue(
    tenant_of: Callable[[str], str], is_fair: bool
) -> None:
    # As one tenant, which is first come first served, the same requests wait for the whole flood.
    server = Server(tenant_of)
    server.arrive("flood", 100)
    server.run(1000, "seldom", 40)
    assert (server.longest_wait["seldom"] <= 10) is is_fair
    assert server.longest_wait["flood"] > 400


class NeverLifted(RequestQueue):
    """Planted fault: idle time earns credit."""

    def append(self, request: Request) -> None:
        super().append(request)
        tenant = self._tenants[request.tenant]
        tenant.service = 0
        self._heap = sorted((0 if name == request.tenant else s, name) for s, name in self._heap)


@pytest.mark.parametrize(("kind", "is_fair"), [(RequestQueue, True), (NeverLifted, False)])
def test_idle_time_earns_nothing(kind: type[RequestQueue], is_fair: bool) -> None:
    queue = kind()
    for order in range(100):
        queue.append(make_request(order, "busy", 10))
    for order in range(50):
        queue.take(order)
    for order in range(1000, 1050):
        queue.append(make_request(order, "newcomer", 10))
    first = Counter(request.tenant for request in list(queue)[:20])
    assert (first["busy"] in (9, 10, 11)) is is_fair


def test_a_tenant_that_leaves_and_returns_keeps_its_debt() -> None:
    queue = RequestQueue()
    for order in range(10):
        queue.append(make_request(order, "patient", 10))
    greedy = make_request(100, "greedy", 1)
    queue.append(greedy)
    queue.take(greedy.order)
    greedy.output_ids += [0] * 25  # a long answer
    queue.charge_output(greedy)
    queue.charge_output(greedy)  # nothing new
    queue.append(make_request(101, "greedy", 1))
    assert [request.tenant for request in queue][:7] == ["patient"] * 6 + ["greedy"]


def test_a_preempted_request_is_charged_once() -> None:
    queue = RequestQueue()
    queue.append(make_request(1, "a", 10))
    queue.append(make_request(2, "a", 10))
    queue.append(make_request(3, "b", 10))
    first = queue.take(1)
    queue.put_back(first)
    assert take_all(queue) == [1, 3, 2]


def test_counters_of_tenants_that_have_gone_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_queue, "_MAX_IDLE_TENANTS", 10)
    queue = RequestQueue()
    queue._forget_above = 20
    waiting = [make_request(order, f"stays-{order}", 10**6) for order in range(5)]
    for request in waiting:
        queue.append(request)
    for order in range(1000, 3000):
        request = make_request(order, f"once-{order}", 4)
        queue.append(request)
        queue.remove(request)
        request.output_ids += [0] * (order % 7)
        queue.charge_output(request)
        assert len(queue._tenants) <= 31 and len(queue._heap) <= 31
    assert take_all(queue) == [0, 1, 2, 3, 4]


def test_the_first_of_many_is_found_without_reading_the_others() -> None:
    queue = RequestQueue()
    read: list[int] = []

    class Watched(Request):
        @property
        def num_to_prefill(self) -> int:
            read.append(self.order)
            return 4

    for order in range(1000):
        plain = make_request(order, f"tenant-{order % 10}")
        queue.append(
            Watched(order, 0, order, "", plain.prompt_ids, 4, GREEDY, 0.0, tenant=plain.tenant)
        )
    read.clear()
    first = iter(queue)
    assert [next(first).order for _ in range(3)] == [0, 1, 2]
    assert len(read) <= 3
    queue.take(0)
    assert set(read) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("tenant", "order", "num_requests", "num_tokens"),
    [
        ("", 99, 3, 30),  # its own, and nothing of the other that has had as much
        ("", 15, 1, 10),  # between its own by urgency
        ("other", 99, 2 + 1.5, 20 + 15),  # after its own two it is on a level with half of ""
        ("new", 0, 0, 0),  # a newcomer is next
    ],
)
def test_what_is_ahead_counts_own_requests_and_what_others_are_due(
    tenant: str, order: int, num_requests: float, num_tokens: float
) -> None:
    queue = RequestQueue()
    for number in (10, 20, 30):
        queue.append(make_request(number, "", 10))
    for number in (11, 21):
        queue.append(make_request(number, "other", 10))
    queue._tenants["other"].service = 0
    queue._tenants[""].service = 5
    if tenant == "":
        queue._tenants["other"].service = 99
    ahead = queue.ahead_of(tenant, order)
    assert (ahead.num_requests, ahead.num_tokens) == (num_requests, num_tokens)


def test_the_preempted_are_ahead_of_everyone_with_all_their_tokens() -> None:
    queue = RequestQueue()
    preempted = make_request(1, "", 10)
    preempted.output_ids = [1, 2, 3]
    queue.put_back(preempted)
    ahead = queue.ahead_of("new", 0)
    assert (ahead.num_requests, ahead.num_tokens) == (1, 13)


def test_priority_counts_like_an_earlier_arrival_and_nobody_starves() -> None:
    """One slot, and a stream of urgent requests that could fill it for ever."""
    queue, precedence = RequestQueue(), Precedence()
    patient = make_request(precedence.take(virtual_arrival(0.5, 0)))
    queue.append(patient)
    served = []
    for second in range(60):
        urgent = precedence.take(virtual_arrival(float(second), -3))
        queue.append(make_request(urgent))
        served.append(next(iter(queue)).order)
        queue.take(served[-1])
    # Urgent ones that arrive within 30 s after it go first, later ones do not.
    assert served.index(patient.order) == 31
