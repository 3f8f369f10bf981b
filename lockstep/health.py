"""`lockstep health`: asks a daemon how it is, for health checks that can only run a command."""

import argparse
import os
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lockstep.client.channel import call_metadata, open_channel
from lockstep.client.config import ClientConfig
from lockstep.connection_flags import add_reach_flags, reach_config
from lockstep.daemon.exit_codes import ExitCode
from lockstep.errors import ConfigError

_CAUSE_KEY = "lockstep-cause"


def main(argv: Sequence[str]) -> int:
    """Prints the status, and if it is not SERVING the cause; returns 0 if it is, else 1.

    2 for wrong flags.
    """
    parser = argparse.ArgumentParser(prog="lockstep health", description=__doc__)
    add_reach_flags(parser)
    parser.add_argument(
        "--service", default="readiness", help="liveness, readiness, rank/<r> (default: readiness)"
    )
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds (default: 5)")
    options = parser.parse_args(list(argv))
    try:
        config = reach_config(options, os.environ)
        status, cause = _ask(options.address, config, options.service, options.timeout)
    except ConfigError as error:
        print(f"lockstep health: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    except grpc.RpcError as error:
        print(f"lockstep health: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    print(f"{name}: {cause}" if cause else name)
    return 0 if status == health_pb2.HealthCheckResponse.SERVING else 1


def _ask(address: str, config: ClientConfig, service: str, timeout_s: float) -> tuple[int, str]:
    """Status and cause; the cause is empty where the server tells none."""
    with open_channel(address, config) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer, call = health_pb2_grpc.HealthStub(channel).Check.with_call(
            request, timeout=timeout_s, metadata=call_metadata(config)
        )
        metadata = dict(call.trailing_metadata() or ())
        return int(answer.status), str(metadata.get(_CAUSE_KEY, ""))
