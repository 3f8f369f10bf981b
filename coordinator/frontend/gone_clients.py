"""Keeps clients that vanish at a bad moment out of the log."""

import logging

import grpc

_GRPC_LOGGER = "grpc._cython.cygrpc"


def ignore_gone_clients() -> None:
    """Drops the records that gRPC writes when a client goes while it is being answered.

    Nothing is wrong then, anybody can cause as many as they like, and their tracebacks may quote
    a request that was being refused.
    """
    logging.getLogger(_GRPC_LOGGER).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, grpc.aio.InternalError)
