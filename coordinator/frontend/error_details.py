"""Statuses in full: google.rpc details beside the message, for programs that read them.

They travel as gRPC's libraries expect them, a serialised google.rpc.Status in the trailing metadata
`grpc-status-details-bin` (grpc_status.rpc_status.from_call reads it).
"""

import re

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"
# Clients take 8 KiB of metadata in all.
_MAX_DESCRIPTION_CHARS = 500


def status_details(
    status: grpc.StatusCode,
    message: str,
    field: str | None = None,
    retry_after_s: float | None = None,
) -> tuple[tuple[str, bytes], ...]:
    """The metadata entry: a BadRequest for `field`, a path as of `field_path`, and a RetryInfo.

    Empty where there is neither.
    """
    details: list[Message] = []
    if field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field, description=message[:_MAX_DESCRIPTION_CHARS]
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


def field_path(named: str, message: Descriptor) -> str:
    """Path from a request, which is a `message`, to the field that our own words name.

    A oneof stands for whichever of its fields is set, or for none that is. "request" where no field
    is at fault that has a name here.
    """
    named = named.removeprefix("request.")  # what a unary call wraps; its paths begin inside
    head = re.split(r"[.\[]", named, maxsplit=1)[0]
    if head in message.oneofs_by_name:
        return head
    if head in message.fields_by_name:
        return named
    params = message.fields_by_name.get("sampling_params")
    kind = None if params is None else params.message_type
    if kind is not None and head in kind.fields_by_name:
        return f"sampling_params.{named}"
    return "request"
