"""Requests without a slot, in the order in which they are to get one."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from coordinator.request import Request

_OUTPUT_WEIGHT = 2  # a generated token costs about two of a prompt
_MAX_IDLE_TENANTS = 1024  # remembered beside those that wait
_by_order = attrgetter("order")


@dataclass(slots=True)
class _Tenant:
    """What a tenant has been given and what it waits for."""

    service: int  # weighted tokens; never falls
    waiting: list[Request] = field(default_factory=list)  # by rising order
    num_tokens: int = 0  # to prefill, of all that wait
    is_listed: bool = False  # has an entry in the heap


@dataclass(frozen=True)
class Ahead:
    """What is to be admitted before a request; fractions because shares are estimated."""

    num_requests: float
    num_tokens: float


class RequestQueue:
    """Who lost its slot comes first, by order; then tenants share by tokens.

    Fairness is that of the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language
    Models", OSDI 2024): each tenant has a counter of the tokens it was given, prompts when they are
    admitted and output as it is generated, with weight 2. The waiting tenant with the smallest
    counter is next (of equals, the first by name); among its requests the smallest order. A tenant
    that begins to wait is lifted to the smallest counter of those that wait already, so that idle
    time earns nothing. A preempted request is not charged again for its second prefill.

    Iterating gives the order of admission without changing anything, lazily: it charges copies of
    the counters for what it has yielded. Waiting requests of a tenant are a sorted list: finding a
    place takes O(log n), and making room moves 8 bytes a request, 2 us at 10,000. Counters of
    tenants that wait for nothing are dropped once they are no more than what a newcomer gets, or
    beyond 1,024 of them.

    Owned by the event loop; not to be changed while it is iterated.
    """

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        """Of the prompts that wait here."""
        self.num_tenants = 0
        """With requests that wait for their first slot."""
        self._taken: list[Request] = []  # since `pop_taken`
        self._returned: list[Request] = []  # preempted, by rising order
        self._tenants: dict[str, _Tenant] = {}
        # (a counter as it was or less, tenant): one entry for each tenant that waits, made exact
        # when it comes to the top. Counters only rise, so whoever is exact at the top is least.
        self._heap: list[tuple[int, str]] = []
        self._floor = 0  # counter of the last tenant served, before it was charged
        self._num_waiting = 0
        self._forget_above = 2 * _MAX_IDLE_TENANTS

    @property
    def num_preempted(self) -> int:
        """That have lost their slots and wait for new ones."""
        return len(self._returned)

    def __len__(self) -> int:
        return len(self._returned) + self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        yield from self._returned
        yield from self._by_fairness()

    def append(self, request: Request) -> None:
        """A new request."""
        tenant = self._tenant(request.tenant)
        if not tenant.waiting:
            tenant.service = max(tenant.service, self._least_service())
            self.num_tenants += 1
            if not tenant.is_listed:
                heapq.heappush(self._heap, (tenant.service, request.tenant))
                tenant.is_listed = True
        request.num_charged = len(request.output_ids)  # resumed ones count as prompt
        insort(tenant.waiting, request, key=_by_order)
        tenant.num_tokens += request.num_to_prefill
        self._num_waiting += 1
        self.num_prompt_tokens += request.prompt_len

    def put_back(self, request: Request) -> None:
        """A request that has lost its slot."""
        insort(self._returned, request, key=_by_order)
        self.num_prompt_tokens += request.prompt_len

    def take(self, order: int) -> Request:
        """Removes and returns the first in the order of admission: it gets a slot.

        The caller names it by `order`; AssertionError if another one is first.
        """
        if self._returned:
            request = self._returned[0]
        else:
            self._floor = max(self._floor, self._least_service())
            tenant = self._tenants[self._heap[0][1]]
            request = tenant.waiting[0]
            tenant.service += request.num_to_prefill
        assert request.order == order, f"request {order} is not first in the queue"
        self.remove(request)
        self._taken.append(request)
        return request

    def pop_taken(self) -> list[Request]:
        """The requests taken since the last call."""
        taken, self._taken = self._taken, []
        return taken

    def remove(self, request: Request) -> None:
        """Removes a request that has ended, wherever it is."""
        self.num_prompt_tokens -= request.prompt_len
        place = _find(self._returned, request)
        if place >= 0:
            del self._returned[place]
            return
        tenant = self._tenants[request.tenant]
        place = _find(tenant.waiting, request)
        assert place >= 0, f"request {request.order} is not in the queue"
        del tenant.waiting[place]
        tenant.num_tokens -= request.num_to_prefill
        self._num_waiting -= 1
        self.num_tenants -= not tenant.waiting

    def charge_output(self, request: Request) -> None:
        """Charges a request's tenant for what has been generated since the last call for it.

        Called for all that run every now and then, and when one ends: so no step pays for it.
        """
        num_new = len(request.output_ids) - request.num_charged
        if num_new:
            request.num_charged += num_new
            self._tenant(request.tenant).service += _OUTPUT_WEIGHT * num_new

    def ahead_of(self, tenant_name: str, order: int) -> Ahead:
        """What would be admitted before a new request if no other came.

        Of the request's own tenant all that have a smaller order, and of the others what they are
        due until that tenant's counter has come to it; of a tenant that is due only a part of what
        it has, so many requests as its tokens make on average.
        """
        num_requests = float(len(self._returned))
        num_tokens = float(sum(request.num_to_prefill for request in self._returned))
        own = self._tenants.get(tenant_name)
        service = max(own.service if own else 0, self._least_service())
        if own is not None and own.waiting:
            before = bisect_left(own.waiting, order, key=_by_order)
            num_own = own.num_tokens
            if before < len(own.waiting):
                num_own = sum(request.num_to_prefill for request in own.waiting[:before])
            service = own.service + num_own
            num_requests += before
            num_tokens += num_own
        for _, name in self._heap:
            other = self._tenants[name]
            if other is own or not other.waiting:
                continue
            share = min(max(service - other.service, 0) / other.num_tokens, 1.0)
            num_requests += share * len(other.waiting)
            num_tokens += share * other.num_tokens
        return Ahead(num_requests, num_tokens)

    def _by_fairness(self) -> Iterator[Request]:
        self._least_service()
        heap = self._heap.copy()
        charged: dict[str, tuple[int, int]] = {}  # counter and how many yielded
        while heap:
            service, name = heap[0]
            tenant = self._tenants[name]
            actual, num_yielded = charged.get(name, (tenant.service, 0))
            if num_yielded == len(tenant.waiting):
                heapq.heappop(heap)
            elif service < actual:
                heapq.heapreplace(heap, (actual, name))
            else:
                request = tenant.waiting[num_yielded]
                yield request
                charged[name] = actual + request.num_to_prefill, num_yielded + 1

    def _least_service(self) -> int:
        """Smallest counter of those that wait; with nobody, that of the last one served."""
        while self._heap:
            service, name = self._heap[0]
            tenant = self._tenants[name]
            if not tenant.waiting:
                heapq.heappop(self._heap)
                tenant.is_listed = False
            elif service < tenant.service:
                heapq.heapreplace(self._heap, (tenant.service, name))
            else:
                return service
        return self._floor

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._forget_above:
                self._forget_idle()
            tenant = self._tenants[name] = _Tenant(self._floor)
        return tenant

    def _forget_idle(self) -> None:
        """Drops counters that no longer matter, and beyond a bound the smallest of the others."""
        least = self._least_service()
        idle = {
            name: tenant.service
            for name, tenant in self._tenants.items()
            if not tenant.waiting and tenant.service > least
        }
        kept = set(heapq.nlargest(_MAX_IDLE_TENANTS, idle, key=idle.__getitem__))
        self._tenants = {
            name: tenant for name, tenant in self._tenants.items() if tenant.waiting or name in kept
        }
        self._heap = [(one.service, name) for name, one in self._tenants.items() if one.waiting]
        heapq.heapify(self._heap)
        for tenant in self._tenants.values():
            tenant.is_listed = bool(tenant.waiting)
        # Doubling makes the sweeps cost O(1) for each new tenant.
        self._forget_above = 2 * max(len(self._tenants), _MAX_IDLE_TENANTS)


def _find(requests: Sequence[Request], request: Request) -> int:
    """Where it is in a list sorted by order; -1 if it is not there."""
    place = bisect_left(requests, request.order, key=_by_order)
    return place if place < len(requests) and requests[place] is request else -1
