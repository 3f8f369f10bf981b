"""Who may drive this worker: the coordinator that holds the group's certificate and secret."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from lockstep.daemon.group_secret import TOKEN_KEY, token_epoch
from lockstep.daemon.tls_files import ReloadedTls, TlsMaterial

_OPEN = "/grpc.health.v1.Health/"
_REFUSAL = (
    "the call shows no join token of this group: --group-secret must name the same secret for "
    "coordinator and workers"
)


class JoinGuard(grpc.aio.ServerInterceptor):
    """Lets health probes through, and calls with the group's join token of no earlier epoch.

    `epoch` tells the last epoch that the worker has taken. On the event loop.
    """

    def __init__(self, secret: bytes, epoch: Callable[[], int]) -> None:
        self._secret = secret
        self._epoch = epoch

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        if details.method.startswith(_OPEN):
            return await continuation(details)
        tokens = [value for key, value in details.invocation_metadata if key == TOKEN_KEY]
        epoch = token_epoch(self._secret, tokens[0]) if len(tokens) == 1 else None
        if epoch is None:
            return _refuse(_REFUSAL)
        if epoch < self._epoch():
            return _refuse(f"the join token is of epoch {epoch}; the worker is in {self._epoch()}")
        return await continuation(details)


def server_credentials(tls: ReloadedTls) -> Any:
    """Credentials that take changed files at the next handshake; peers must be of `tls`'s CA."""

    def changed() -> Any:
        material = tls.changed()
        return None if material is None else _configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(tls.first), changed, require_client_authentication=True
    )


def _configuration(material: TlsMaterial) -> Any:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.ca)


def _refuse(why: str) -> Any:
    """A handler that answers any kind of call at once, without waiting for a message."""

    async def refuse(requests: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)

    return grpc.stream_stream_rpc_method_handler(refuse)
