"""grpc.health.v1 over what the frontend knows of the group.

The stock asyncio servicer keeps a lock while it writes to a watcher, so that one slow watcher holds
up every change, and forgets all watchers of a name when one of them leaves.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.frontend.services import GENERATE_SERVICE, VLLM_ENGINE

LIVENESS = "liveness"
CAUSE_KEY = "lockstep-cause"
# Anybody may watch, for as long as they like.
MAX_WATCHERS = 1024
_MAX_CAUSE_CHARS = 1000
_MAX_SHOWN_CHARS = 100
_READINESS_NAMES = (
    "",
    "readiness",
    GENERATE_SERVICE.full_name,
    VLLM_ENGINE.full_name,
)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):
    """What load balancers and probes ask.

    Names: "", `readiness` and those of the services (can answer), `liveness` (the event loop
    runs), `rank/<r>`. What is not SERVING has its cause in the trailing metadata `lockstep-cause`,
    of each Check and of a Watch that ends.

    All methods run on the server's event loop. Answers cost no request to the engine.
    """

    def __init__(self) -> None:
        self._statuses = {LIVENESS: _SERVING} | dict.fromkeys(_READINESS_NAMES, _NOT_SERVING)
        self._cause = ""
        self._changed = asyncio.Event()
        self._is_closed = False
        self._num_watchers = 0

    def set_ready(self, is_ready: bool, cause: str = "") -> None:
        """Says whether requests can be answered, and if not, why."""
        self._cause = "" if is_ready else cause
        self._update(dict.fromkeys(_READINESS_NAMES, _SERVING if is_ready else _NOT_SERVING))

    def set_ranks(self, is_up: dict[int, bool]) -> None:
        """Says which ranks are up."""
        self._update(
            {f"rank/{rank}": _SERVING if up else _NOT_SERVING for rank, up in is_up.items()}
        )

    def close(self) -> None:
        """Ends every Watch after its last change, so that the server can stop."""
        self._is_closed = True
        self._wake_watchers()

    def _update(self, statuses: dict[str, int]) -> None:
        if any(self._statuses.get(name) != status for name, status in statuses.items()):
            self._statuses |= statuses
            self._wake_watchers()

    def _wake_watchers(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        status = self._statuses.get(request.service)
        if status is None:
            known = ", ".join(repr(name) for name in self._statuses)
            shown = repr(request.service[:_MAX_SHOWN_CHARS])
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service is {shown}; known are {known}")
        self._tell_cause(status, context)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        if self._num_watchers >= MAX_WATCHERS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watch already: use Check"
            )
        self._num_watchers += 1
        try:
            await self._watch(request, context)
        finally:
            self._num_watchers -= 1

    async def _watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        last = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
                continue  # the status may have changed during the write
            if self._is_closed:
                self._tell_cause(status, context)
                return
            await changed.wait()

    def _tell_cause(self, status: int | None, context: Any) -> None:
        if status == _NOT_SERVING and self._cause:
            context.set_trailing_metadata(((CAUSE_KEY, _as_header(self._cause)),))


def _as_header(text: str) -> str:
    """As gRPC takes a value: printable ASCII, and not long."""
    line = " ".join(text.split()).encode("ascii", "backslashreplace").decode("ascii")
    return "".join(char for char in line if char.isprintable())[:_MAX_CAUSE_CHARS]
