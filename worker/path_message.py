"""What preflight found, as a message."""

from __future__ import annotations

from collections.abc import Sequence

import tpcomm
from protos.lockstep.v1 import worker_pb2


def preflight_response(
    comm: tpcomm.Communicator, reports: Sequence[tpcomm.PathReport]
) -> worker_pb2.PreflightResponse:
    """The verdicts, and the table that `comm` chooses by, if it has a choice."""
    routes = comm.table.routes if isinstance(comm, tpcomm.HasTable) else ()
    return worker_pb2.PreflightResponse(
        paths=[_path_report(report) for report in reports],
        routes=[
            worker_pb2.PathRoute(
                operation=route.operation, max_byte_count=route.max_bytes, path=route.path
            )
            for route in routes
        ],
    )


def _path_report(report: tpcomm.PathReport) -> worker_pb2.PathReport:
    return worker_pb2.PathReport(
        path=report.path,
        is_usable=report.usable,
        detail=report.detail,
        operation=report.operation,
        times=[
            worker_pb2.PathTime(byte_count=num_bytes, microseconds=microseconds)
            for num_bytes, microseconds in report.times
        ],
    )
