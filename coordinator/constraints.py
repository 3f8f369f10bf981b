"""Which request waits for which mask."""

from collections.abc import Sequence
from typing import Protocol

from coordinator.request import Request
from protos.lockstep.v1 import generate_pb2, grammar_pb2


class MaskSource(Protocol):
    """As GrammarPool."""

    def open(
        self,
        key: int,
        params: generate_pb2.SamplingParams,
        output_ids: Sequence[int],
        vocab_size: int,
    ) -> None: ...

    def advance(self, key: int, token_id: int) -> None: ...

    def close(self, key: int) -> None: ...


class Constraints:
    """The constrained requests in flight. Owned by the event loop."""

    def __init__(self, source: MaskSource) -> None:
        self._source = source
        self._requests: dict[int, Request] = {}
        self._last_key = 0

    def began(self, request: Request, vocab_size: int) -> None:
        """A constrained request was taken in: its first mask is to be made."""
        assert request.constraint is not None
        self._last_key += 1
        request.constraint_key = self._last_key
        self._requests[self._last_key] = request
        self._source.open(self._last_key, request.constraint, request.output_ids, vocab_size)

    def got_token(self, request: Request, token_id: int) -> None:
        """A token that is not the last is known; the next mask is to be made."""
        self._source.advance(request.constraint_key, token_id)

    def ended(self, request: Request) -> None:
        """A constrained request is over."""
        del self._requests[request.constraint_key]
        self._source.close(request.constraint_key)

    def take(self, reply: grammar_pb2.GrammarReply) -> Request | None:
        """Gives a request its mask, unless the reply says that there is none; None if it ended."""
        request = self._requests.get(reply.key)
        if request is not None and not reply.status_code:
            request.next_mask = reply.mask
        return request
