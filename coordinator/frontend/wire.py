"""Bytes to messages: what does not parse or says what we do not know is answered, not dropped.

The stock deserialiser ends an unparsable call with INTERNAL before a handler runs. Ours hands the
handler an `Unparsable` instead, which becomes INVALID_ARGUMENT like every other bad input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf import unknown_fields
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from coordinator.errors import BadRequest
from protos.lockstep.v1 import generate_pb2

_LENGTH_DELIMITED = 2


@dataclass(frozen=True)
class Unparsable:
    """A request that is no message of its type."""

    error: BadRequest


def deserialiser(
    asked: Descriptor, refuses_unknown: bool = True
) -> Callable[[bytes], Message | Unparsable]:
    """A deserialiser of requests of the type `asked` that never raises."""
    message_class = GetMessageClass(asked)

    def deserialise(raw: bytes) -> Message | Unparsable:
        try:
            message = message_class.FromString(raw)
        except DecodeError:
            return Unparsable(_why_unparsable(asked, raw))
        unknown = _unknown_field(message) if refuses_unknown else None
        if unknown is not None:
            return Unparsable(BadRequest(*unknown))
        return message

    return deserialise


def _why_unparsable(descriptor: Descriptor, raw: bytes) -> BadRequest:
    field = _invalid_utf8_field(descriptor, raw)
    if field is not None:
        return BadRequest(field[0], field[1], "valid UTF-8")
    return BadRequest("request", raw[:16], f"a serialised {descriptor.full_name}")


def _invalid_utf8_field(descriptor: Descriptor, raw: bytes) -> tuple[str, bytes] | None:
    """Path and bytes of the first string in `raw` that is not UTF-8, None if that is not its fault.

    A message without fields of its own shows every field as unknown, with its raw bytes.
    """
    try:
        bare = generate_pb2.GetModelInfoRequest.FromString(raw)
    except DecodeError:
        return None
    for entry in _unknown_entries(bare):
        field = descriptor.fields_by_number.get(entry.field_number)
        if field is None or entry.wire_type != _LENGTH_DELIMITED:
            continue
        if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(entry.data):
            return field.name, entry.data[:32]
        if field.message_type is not None:
            inner = _invalid_utf8_field(field.message_type, entry.data)
            if inner is not None:
                return f"{field.name}.{inner[0]}", inner[1]
    return None


def _unknown_entries(message: Message) -> list[Any]:
    fields: Any = unknown_fields.UnknownFieldSet(message)  # a sequence, which its stub leaves out
    return list(fields)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _unknown_field(message: Message) -> tuple[str, str, str] | None:
    """(path, value, limit) of the first field that this version does not know.

    Ignoring it could ignore a constraint that a newer client relies on.
    """
    for entry in _unknown_entries(message):
        name = message.DESCRIPTOR.full_name
        return (
            f"field {entry.field_number} of {name}",
            "set",
            "unset: this server's version does not know it",
        )
    for field, value in message.ListFields():
        # Maps in requests have numbers for values: no messages to look into.
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inner in value if field.is_repeated else (value,):
            unknown = _unknown_field(inner)
            if unknown is not None:
                return unknown
    return None
