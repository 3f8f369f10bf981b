"""Who calls, by the key in a call's metadata, and what that lets them do."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from coordinator.frontend.api_keys import ApiKeys
from coordinator.frontend.errors import Unauthenticated, WrongTenant
from coordinator.sampling_limits import MAX_TENANT_CHARS

_KEY = "authorization"
_SCHEME = "bearer"
# Probes and load balancers have no keys, and learn nothing but whether the server can answer.
_OPEN = "/grpc.health.v1.Health/"

_Metadata = Iterable[tuple[str, str | bytes]] | None


class Callers:
    """With `keys` None nobody has to say who they are. On the event loop."""

    def __init__(self, keys: ApiKeys | None) -> None:
        self._keys = keys

    def check(self, metadata: _Metadata) -> None:
        """Raises Unauthenticated for a caller that is not known."""
        if self._keys is not None:
            _owner(self._keys, metadata)

    def tenant(self, context: Any, named: str) -> str:
        """Whom a call is for that names the tenant `named`: with keys their owner, and no other.

        Raises Unauthenticated, WrongTenant.
        """
        if self._keys is None:
            return named
        own = _owner(self._keys, context.invocation_metadata())
        if named not in ("", own):
            shown = repr(named[:MAX_TENANT_CHARS])
            raise WrongTenant(f"tenant is {shown}; it must be empty or {own!r}, the API key's")
        return own


class CallGuard(grpc.aio.ServerInterceptor):
    """Lets calls in whose caller is known, and health probes. `count` is told of each refusal."""

    def __init__(self, callers: Callers, count: Callable[[str], None]) -> None:
        self._callers = callers
        self._count = count

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        if not details.method.startswith(_OPEN):
            try:
                self._callers.check(details.invocation_metadata)
            except Unauthenticated as error:
                self._count("unauthenticated")
                return _refuse(str(error))
        return await continuation(details)


def _owner(keys: ApiKeys, metadata: _Metadata) -> str:
    given = [value for key, value in metadata or () if key == _KEY]
    if len(given) != 1 or not isinstance(given[0], str):
        raise Unauthenticated("the call needs metadata `authorization: Bearer <API key>`")
    scheme, _, key = given[0].partition(" ")
    tenant = keys.tenant_of(key.strip()) if scheme.lower() == _SCHEME else None
    if tenant is None:
        raise Unauthenticated("the API key in the metadata `authorization` is not known here")
    return tenant


def _refuse(why: str) -> Any:
    """A handler that answers any kind of call at once, without waiting for a message."""

    async def refuse(requests: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)

    return grpc.stream_stream_rpc_method_handler(refuse)
