"""A call whose client goes in the moment that it is refused ends without a word in the log."""

import asyncio
import traceback
from typing import Any

import grpc
import pytest

from coordinator.errors import BadRequest
from coordinator.frontend.rejections import answered
from coordinator.frontend.wire import Unparsable


class GoneClient:
    """A context whose every operation fails as gRPC's do when the client has gone."""

    def trailing_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, code: grpc.StatusCode, message: str, metadata: Any) -> None:
        raise grpc.aio.InternalError("a batch failed")

    async def write(self, message: Any) -> None:
        raise grpc.aio.InternalError("a batch failed")


async def refuse(request: Any, context: Any) -> None:
    raise BadRequest("stop[0]", "what the user wrote", "shorter")


async def write(request: Any, context: Any) -> None:
    await context.write(request)


@pytest.mark.parametrize("method", [refuse, write])
def test_it_ends_as_a_cancelled_call_that_quotes_nothing(method: Any) -> None:
    async def main() -> None:
        with pytest.raises(asyncio.CancelledError) as ended:
            await answered(method, lambda reason: None)("request", GoneClient())  # type: ignore[arg-type]
        lines = traceback.format_exception(ended.value)
        assert "what the user wrote" not in "".join(lines)

    asyncio.run(main())


def test_errors_that_are_bugs_are_not_hidden() -> None:
    async def broken(request: Any, context: Any) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await answered(broken, lambda reason: None)("request", GoneClient())  # type: ignore[arg-type]

    asyncio.run(main())


def test_what_does_not_parse_is_refused_like_everything_else() -> None:
    unparsable = Unparsable(BadRequest("request", b"", "a message"))
    counted: list[str] = []

    async def main() -> None:
        with pytest.raises(asyncio.CancelledError):
            await answered(write, counted.append)(unparsable, GoneClient())

    asyncio.run(main())
    assert counted == ["invalid_argument"]
