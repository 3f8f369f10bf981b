"""The last collectives as the coordinator gets them."""

from __future__ import annotations

import time

import tpcomm
from protos.lockstep.v1 import worker_pb2


def recorded_message(recorded: tpcomm.Recorded) -> worker_pb2.DumpFlightRecorderResponse:
    """The calls in the same order, and the totals; as of now."""
    return worker_pb2.DumpFlightRecorderResponse(
        collectives=[
            worker_pb2.CollectiveRecord(
                sequence=call.sequence,
                operation=call.operation,
                path=call.path,
                byte_count=call.num_bytes,
                begun_nanos=call.begun_ns,
                ended_nanos=call.ended_ns,
            )
            for call in recorded.calls
        ],
        now_nanos=time.monotonic_ns(),
        ended_count=recorded.num_calls,
        ended_micros=round(recorded.seconds * 1e6),
    )
