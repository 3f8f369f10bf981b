"""Statuses in full: google.rpc details beside the message, for programs that read them.

They travel as gRPC's libraries expect them, a serialised google.rpc.Status in the trailing metadata
`grpc-status-details-bin` (grpc_status.rpc_status.from_call reads it).
"""

import re

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from protos.lockstep.v1 import generate_pb2

DETAILS_KEY = "grpc-status-details-bin"
# Clients take 8 KiB of metadata in all.
_MAX_DESCRIPTION_CHARS = 500
_PROMPT = ("prompt tokens", "tokenised prompt")


def status_details(
    status: grpc.StatusCode,
    message: str,
    field: str | None = None,
    retry_after_s: float | None = None,
) -> tuple[tuple[str, bytes], ...]:
    """The metadata entry: a BadRequest for `field`, a RetryInfo; empty where there is neither."""
    details: list[Message] = []
    if field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field_path(field), description=message[:_MAX_DESCRIPTION_CHARS]
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        details.append(retry)
    if not details:
        return ()
    whole = status_pb2.Status(code=status.value[0], message=message[:_MAX_DESCRIPTION_CHARS])
    for detail in details:
        whole.details.add().Pack(detail)
    return ((DETAILS_KEY, whole.SerializeToString()),)


def field_path(field: str) -> str:
    """Path from the request message to the field that our own words name."""
    if field.startswith(_PROMPT):
        return "prompt"
    if field.startswith("field "):  # one that has no name here
        return "request"
    head = re.split(r"[.\[]", field, maxsplit=1)[0]
    if head in generate_pb2.SamplingParams.DESCRIPTOR.fields_by_name:
        return f"sampling_params.{field}"
    return field
