"""What gRPC writes of clients that vanish is dropped, and nothing else."""

import logging
from collections.abc import Iterator

import grpc
import pytest

from coordinator.errors import BadRequest
from coordinator.frontend.gone_clients import _GRPC_LOGGER, ignore_gone_clients


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger(_GRPC_LOGGER)
    before = list(found.filters)
    ignore_gone_clients()
    yield found
    found.filters = before


def write(logger: logging.Logger, error: Exception) -> None:
    """As gRPC does it: with the error, and what it came while handling of."""
    try:
        try:
            raise BadRequest("stop[0]", "what the user wrote", "shorter")
        except BadRequest as refused:
            raise error from refused
    except type(error):
        logger.exception("raised by servicer method")


def test_a_client_that_went_leaves_no_line(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    write(logger, grpc.aio.InternalError("a batch failed"))
    assert not caplog.records


def test_everything_else_is_written(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    write(logger, ZeroDivisionError())
    logger.error("no error to show")
    assert len(caplog.records) == 2


def test_it_is_the_logger_that_grpc_writes_to() -> None:
    from grpc._cython import cygrpc

    assert cygrpc.__name__ == _GRPC_LOGGER
    assert issubclass(cygrpc.ExecuteBatchError, grpc.aio.InternalError)
