"""Whether this frontend may take a request, and what it knows of the group behind it."""

from coordinator.frontend.errors import Draining, NotReady
from coordinator.frontend.health import HealthService
from protos.lockstep.v1 import engine_pb2, generate_pb2

_STOPPING = "the server is stopping and takes no new requests"


class Availability:
    """The engine's last word on the group, mirrored into health. Runs on the event loop."""

    def __init__(self, health: HealthService) -> None:
        self._health = health
        self._state = engine_pb2.GroupState(cause="the coordinator is starting")
        self._is_withdrawn = False
        self._is_draining = False

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output, in tokens; 0 while unknown."""
        return self._state.max_model_len

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size); 0 while unknown."""
        return self._state.vocab_size

    @property
    def server_response(self) -> generate_pb2.GetServerInfoResponse:
        """What GetServerInfo answers, readiness included."""
        response = generate_pb2.GetServerInfoResponse()
        response.CopyFrom(self._state.server)
        response.is_ready = self._state.is_ready and not self._is_withdrawn
        response.is_draining = self._is_withdrawn
        return response

    def update(self, state: engine_pb2.GroupState) -> None:
        """Takes over a message of the engine."""
        self._state = state
        self._tell_ready()
        self._health.set_ranks({rank.rank: rank.is_up for rank in state.server.ranks})

    def withdraw(self) -> None:
        """Readiness off, for good; who has not heard of it yet is still served."""
        self._is_withdrawn = True
        self._tell_ready()

    def start_draining(self) -> None:
        """No new requests any more."""
        self.withdraw()
        self._is_draining = True

    def lose_engine(self, cause: str) -> None:
        """Readiness off: nobody is left to say when it could be on again."""
        self.update(engine_pb2.GroupState(cause=cause, server=self._state.server))

    def _tell_ready(self) -> None:
        if self._is_withdrawn:
            self._health.set_ready(False, _STOPPING)
        else:
            self._health.set_ready(self._state.is_ready, self._state.cause)

    def require_ready(self) -> None:
        """Raises Draining or NotReady."""
        if self._is_draining:
            raise Draining(_STOPPING)
        if not self._state.is_ready:
            raise NotReady(f"the server cannot answer now: {self._state.cause or 'no cause given'}")
