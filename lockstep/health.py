"""`lockstep health`: asks a daemon how it is, for health checks that can only run a command."""

import argparse
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lockstep.connection_flags import add_address_flag


def main(argv: Sequence[str]) -> int:
    """Prints the status; returns 0 if it is SERVING, else 1."""
    parser = argparse.ArgumentParser(prog="lockstep health", description=__doc__)
    add_address_flag(parser)
    parser.add_argument(
        "--service", default="readiness", help="liveness, readiness, rank/<r> (default: readiness)"
    )
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds (default: 5)")
    options = parser.parse_args(list(argv))
    try:
        status = _ask(options.address, options.service, options.timeout)
    except grpc.RpcError as error:
        print(f"lockstep health: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    return 0 if status == health_pb2.HealthCheckResponse.SERVING else 1


def _ask(address: str, service: str, timeout_s: float) -> int:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        return int(answer.status)
