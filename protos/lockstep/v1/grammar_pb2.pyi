from protos.lockstep.v1 import generate_pb2 as _generate_pb2
from protos.lockstep.v1 import worker_pb2 as _worker_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GrammarRequest(_message.Message):
    __slots__ = ("open", "advance", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ADVANCE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: OpenGrammar
    advance: AdvanceGrammar
    close: CloseGrammar
    def __init__(self, open: _Optional[_Union[OpenGrammar, _Mapping]] = ..., advance: _Optional[_Union[AdvanceGrammar, _Mapping]] = ..., close: _Optional[_Union[CloseGrammar, _Mapping]] = ...) -> None: ...

class OpenGrammar(_message.Message):
    __slots__ = ("key", "params", "output_ids")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    key: int
    params: _generate_pb2.SamplingParams
    output_ids: bytes
    def __init__(self, key: _Optional[int] = ..., params: _Optional[_Union[_generate_pb2.SamplingParams, _Mapping]] = ..., output_ids: _Optional[bytes] = ...) -> None: ...

class AdvanceGrammar(_message.Message):
    __slots__ = ("key", "token_id")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    key: int
    token_id: int
    def __init__(self, key: _Optional[int] = ..., token_id: _Optional[int] = ...) -> None: ...

class CloseGrammar(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: int
    def __init__(self, key: _Optional[int] = ...) -> None: ...

class GrammarReply(_message.Message):
    __slots__ = ("key", "status_code", "status_message", "mask")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATUS_CODE_FIELD_NUMBER: _ClassVar[int]
    STATUS_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    key: int
    status_code: int
    status_message: str
    mask: _worker_pb2.SlotMask
    def __init__(self, key: _Optional[int] = ..., status_code: _Optional[int] = ..., status_message: _Optional[str] = ..., mask: _Optional[_Union[_worker_pb2.SlotMask, _Mapping]] = ...) -> None: ...
