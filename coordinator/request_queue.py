"""Requests without a slot, in the order in which they are to get one."""

from collections import deque
from collections.abc import Iterator

from coordinator.request import Request


class RequestQueue:
    """First come, first served; who lost its slot comes before all who never had one.

    Iterating gives the order of admission without changing anything. Owned by the event loop.
    """

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()
        self.num_prompt_tokens = 0
        """Of the prompts that wait here."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def append(self, request: Request) -> None:
        """A new request."""
        self._requests.append(request)
        self.num_prompt_tokens += request.prompt_len

    def put_back(self, request: Request) -> None:
        """A request that has lost its slot."""
        self._requests.appendleft(request)
        self.num_prompt_tokens += request.prompt_len

    def take(self, order: int) -> Request:
        """Removes and returns a request that gets a slot: the first in the order of admission."""
        request = self._requests.popleft()
        assert request.order == order, f"request {order} is not first in the queue"
        self.num_prompt_tokens -= request.prompt_len
        return request

    def remove(self, request: Request) -> None:
        """Removes a request that has ended, wherever it is."""
        self._requests.remove(request)
        self.num_prompt_tokens -= request.prompt_len
