"""grpc.health.v1 over what the frontend knows of the group.

The stock asyncio servicer keeps a lock while it writes to a watcher, so that one slow watcher holds
up every change, and forgets all watchers of a name when one of them leaves.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

LIVENESS = "liveness"
_READINESS_NAMES = (
    "",
    "readiness",
    "lockstep.v1.GenerateService",
    "vllm.grpc.engine.VllmEngine",
)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):
    """What load balancers and probes ask.

    Names: "", `readiness` and those of the services (can answer), `liveness` (the event loop
    runs), `rank/<r>`.

    All methods run on the server's event loop. Answers cost no request to the engine.
    """

    def __init__(self) -> None:
        self._statuses = {LIVENESS: _SERVING} | dict.fromkeys(_READINESS_NAMES, _NOT_SERVING)
        self._changed = asyncio.Event()
        self._is_closed = False

    def set_ready(self, is_ready: bool) -> None:
        """Says whether requests can be answered."""
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
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"service is {request.service!r}; known are {known}"
            )
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        last = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
                continue  # the status may have changed during the write
            if self._is_closed:
                return
            await changed.wait()
