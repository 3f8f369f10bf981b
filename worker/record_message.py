"""The last collectives as the coordinator gets them."""

from __future__ import annotations

from collections.abc import Sequence

import tpcomm
from protos.lockstep.v1 import worker_pb2


def collective_records(
    records: Sequence[tpcomm.CollectiveRecord],
) -> list[worker_pb2.CollectiveRecord]:
    """One message a call, in the same order."""
    return [
        worker_pb2.CollectiveRecord(
            sequence=record.sequence,
            operation=record.operation,
            path=record.path,
            byte_count=record.num_bytes,
            begun_nanos=record.begun_ns,
            ended_nanos=record.ended_ns,
        )
        for record in records
    ]
