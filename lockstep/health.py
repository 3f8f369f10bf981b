"""`lockstep health`: asks a daemon how it is, for health checks that can only run a command."""

import argparse
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lockstep.connection import Connection, add_connection_flags
from lockstep.daemon.exit_codes import ExitCode
from lockstep.errors import ConfigError

_CAUSE_KEY = "lockstep-cause"


def main(argv: Sequence[str]) -> int:
    """Prints the status, and if it is not SERVING the cause; returns 0 if it is, else 1.

    2 for wrong flags.
    """
    parser = argparse.ArgumentParser(prog="lockstep health", description=__doc__)
    add_connection_flags(parser)
    parser.add_argument(
        "--service", default="readiness", help="liveness, readiness, rank/<r> (default: readiness)"
    )
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds (default: 5)")
    options = parser.parse_args(list(argv))
    try:
        connection = Connection.of_options(options)
        status, cause = _ask(connection, options.service, options.timeout)
    except ConfigError as error:
        print(f"lockstep health: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    except grpc.RpcError as error:
        print(f"lockstep health: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    print(f"{name}: {cause}" if cause else name)
    return 0 if status == health_pb2.HealthCheckResponse.SERVING else 1


def _ask(connection: Connection, service: str, timeout_s: float) -> tuple[int, str]:
    """Status and cause; the cause is empty where the server tells none."""
    with connection.channel([("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer, call = health_pb2_grpc.HealthStub(channel).Check.with_call(
            request, timeout=timeout_s
        )
        metadata = dict(call.trailing_metadata() or ())
        return int(answer.status), str(metadata.get(_CAUSE_KEY, ""))
