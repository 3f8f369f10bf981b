"""Hostile messages for every public call: extreme values, and bytes that are hardly a message."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2

_FILES = (generate_pb2, health_pb2, reflection_pb2, vllm_engine_pb2)
_INTS = (-(2**63), -(2**31), -1000, -1, 0, 1, 2, 3, 16, 17, 255, 2**16, 2**31 - 1, 2**63 - 1)
_FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-38, 0.5, 1.0, 2.0, 1e38)
_TEXTS = ("", "a", "\0", "é", "\U0001f600" * 9, "<|im_end|>", "{{ 7*7 }}", "%s%n", "x" * 300)
_SIGNED_32 = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_ENUM}
_UNSIGNED = {FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64}
_MAX_DEPTH = 4


@dataclass(frozen=True)
class Rpc:
    """A public call; every kind can be made as one message out and a stream in."""

    path: str
    request: Descriptor

    @property
    def is_ours(self) -> bool:
        return self.path.startswith("/lockstep.")


def public_rpcs() -> list[Rpc]:
    """All calls of the services that a frontend has."""
    return [
        Rpc(f"/{service.full_name}/{method.name}", method.input_type)
        for file in _FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


def hostile_message(rng: random.Random, rpc: Rpc) -> bytes:
    """A serialised request: extreme, or nearly good, or spoilt on the way."""
    if rpc.is_ours and "Generate" in rpc.path and rng.random() < 0.6:
        raw = _nearly_good(rng, rpc)
    else:
        raw = extreme_message(rng, rpc.request).SerializeToString()
    return spoilt(rng, raw) if rng.random() < 0.3 else raw


def extreme_message(rng: random.Random, descriptor: Descriptor, depth: int = 0) -> Any:
    """A message of that type with some fields set to values at and beyond their limits."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if rng.random() < 0.4:
            _set(rng, message, field, depth)
    return message


def spoilt(rng: random.Random, raw: bytes) -> bytes:
    """Bytes changed, cut, doubled or thrown in."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data))
        match rng.randint(0, 4):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randint(0, 7)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 12))
            case 3:
                data[at:at] = data[: rng.randint(0, 64)]
            case _:
                data[at:at] = b"\xff" * rng.randint(1, 11)  # a varint without an end
    return bytes(data)


def _nearly_good(rng: random.Random, rpc: Rpc) -> bytes:
    """A request that would be served but for a field or two, and perhaps will be."""
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=[rng.randint(0, 255) for _ in range(rng.randint(1, 9))])
    )
    request.sampling_params.max_tokens = rng.randint(1, 12)
    descriptor: Any = request.sampling_params.DESCRIPTOR
    for field in rng.sample(list(descriptor.fields), rng.randint(0, 2)):
        _set(rng, request.sampling_params, field, 0)
    descriptor = request.DESCRIPTOR
    for field in rng.sample(list(descriptor.fields), rng.randint(0, 1)):
        _set(rng, request, field, 1)
    if rpc.request is generate_pb2.GenerateRequest.DESCRIPTOR:
        return request.SerializeToString()
    return generate_pb2.GenerateUnaryRequest(request=request).SerializeToString()


def _set(rng: random.Random, message: Any, field: FieldDescriptor, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        for _ in range(rng.choice((1, 2, 17, 300)) if depth < 2 else 1):
            getattr(message, field.name)[_value(rng, key, depth)] = _value(rng, value, depth)
        return
    if field.is_repeated:
        count = rng.choice((1, 2, 17, 300)) if depth < 2 else 1
        values = [_value(rng, field, depth) for _ in range(count)]
        getattr(message, field.name).extend([value for value in values if value is not None])
        return
    value = _value(rng, field, depth)
    if value is None:
        return
    if field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _value(rng: random.Random, field: FieldDescriptor, depth: int) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        if depth >= _MAX_DEPTH or field.message_type is None:
            return None
        return extreme_message(rng, field.message_type, depth + 1)
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = rng.choice(_TEXTS)
        value = text * 1000 if rng.random() < 0.02 else text
        return value.encode() if field.type == FieldDescriptor.TYPE_BYTES else value
    number = rng.choice(_INTS)
    if kind in _SIGNED_32:
        return max(-(2**31), min(number, 2**31 - 1))
    if kind in _UNSIGNED:
        return abs(number) % 2**32
    return number
