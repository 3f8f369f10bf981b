from protos.lockstep.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepLogRecord(_message.Message):
    __slots__ = ("header", "snapshot", "command", "report", "gap", "end")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    header: StepLogHeader
    snapshot: StepLogSnapshot
    command: StepLogCommand
    report: StepLogReport
    gap: StepLogGap
    end: StepLogEnd
    def __init__(self, header: _Optional[_Union[StepLogHeader, _Mapping]] = ..., snapshot: _Optional[_Union[StepLogSnapshot, _Mapping]] = ..., command: _Optional[_Union[StepLogCommand, _Mapping]] = ..., report: _Optional[_Union[StepLogReport, _Mapping]] = ..., gap: _Optional[_Union[StepLogGap, _Mapping]] = ..., end: _Optional[_Union[StepLogEnd, _Mapping]] = ...) -> None: ...

class StepLogHeader(_message.Message):
    __slots__ = ("format_version", "package_version", "model_digest", "config", "world_size", "block_count", "epoch", "unix_micros", "monotonic_micros")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UNIX_MICROS_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_MICROS_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    package_version: str
    model_digest: str
    config: _worker_pb2.EngineConfig
    world_size: int
    block_count: int
    epoch: int
    unix_micros: int
    monotonic_micros: int
    def __init__(self, format_version: _Optional[int] = ..., package_version: _Optional[str] = ..., model_digest: _Optional[str] = ..., config: _Optional[_Union[_worker_pb2.EngineConfig, _Mapping]] = ..., world_size: _Optional[int] = ..., block_count: _Optional[int] = ..., epoch: _Optional[int] = ..., unix_micros: _Optional[int] = ..., monotonic_micros: _Optional[int] = ...) -> None: ...

class StepLogSnapshot(_message.Message):
    __slots__ = ("command_id", "step", "slots", "row_slots")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    ROW_SLOTS_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    step: int
    slots: _containers.RepeatedCompositeFieldContainer[StepLogSlot]
    row_slots: bytes
    def __init__(self, command_id: _Optional[int] = ..., step: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[StepLogSlot, _Mapping]]] = ..., row_slots: _Optional[bytes] = ...) -> None: ...

class StepLogSlot(_message.Message):
    __slots__ = ("open", "prefilled_count", "token_ids", "mask")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    open: _worker_pb2.SlotOpen
    prefilled_count: int
    token_ids: bytes
    mask: _worker_pb2.SlotMask
    def __init__(self, open: _Optional[_Union[_worker_pb2.SlotOpen, _Mapping]] = ..., prefilled_count: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., mask: _Optional[_Union[_worker_pb2.SlotMask, _Mapping]] = ...) -> None: ...

class StepLogCommand(_message.Message):
    __slots__ = ("monotonic_micros", "request")
    MONOTONIC_MICROS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    monotonic_micros: int
    request: bytes
    def __init__(self, monotonic_micros: _Optional[int] = ..., request: _Optional[bytes] = ...) -> None: ...

class StepLogReport(_message.Message):
    __slots__ = ("monotonic_micros", "rank", "response")
    MONOTONIC_MICROS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    monotonic_micros: int
    rank: int
    response: _worker_pb2.ExecuteResponse
    def __init__(self, monotonic_micros: _Optional[int] = ..., rank: _Optional[int] = ..., response: _Optional[_Union[_worker_pb2.ExecuteResponse, _Mapping]] = ...) -> None: ...

class StepLogGap(_message.Message):
    __slots__ = ("dropped_count", "command_id")
    DROPPED_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    dropped_count: int
    command_id: int
    def __init__(self, dropped_count: _Optional[int] = ..., command_id: _Optional[int] = ...) -> None: ...

class StepLogEnd(_message.Message):
    __slots__ = ("cause", "monotonic_micros")
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_MICROS_FIELD_NUMBER: _ClassVar[int]
    cause: str
    monotonic_micros: int
    def __init__(self, cause: _Optional[str] = ..., monotonic_micros: _Optional[int] = ...) -> None: ...
