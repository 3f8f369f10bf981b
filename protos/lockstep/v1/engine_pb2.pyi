from protos.lockstep.v1 import generate_pb2 as _generate_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrontendMessage(_message.Message):
    __slots__ = ("submit", "release", "abort", "rejected", "listening", "alive")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    LISTENING_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    release: Release
    abort: AbortByName
    rejected: Rejected
    listening: Listening
    alive: Alive
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., abort: _Optional[_Union[AbortByName, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., listening: _Optional[_Union[Listening, _Mapping]] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "request_id", "prompt_ids", "resume_output_ids", "sampling_params", "stop_ids", "arrival_time", "priority", "tenant", "use_prefix_cache", "deadline", "group", "bad_words")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    RESUME_OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_TIME_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    USE_PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    prompt_ids: bytes
    resume_output_ids: bytes
    sampling_params: _generate_pb2.SamplingParams
    stop_ids: bytes
    arrival_time: float
    priority: int
    tenant: str
    use_prefix_cache: bool
    deadline: float
    group: int
    bad_words: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_ids: _Optional[bytes] = ..., resume_output_ids: _Optional[bytes] = ..., sampling_params: _Optional[_Union[_generate_pb2.SamplingParams, _Mapping]] = ..., stop_ids: _Optional[bytes] = ..., arrival_time: _Optional[float] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., use_prefix_cache: bool = ..., deadline: _Optional[float] = ..., group: _Optional[int] = ..., bad_words: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("handle", "reason", "output_token_count")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: str
    output_token_count: int
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[str] = ..., output_token_count: _Optional[int] = ...) -> None: ...

class AbortByName(_message.Message):
    __slots__ = ("query", "request_id")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    query: int
    request_id: str
    def __init__(self, query: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("reason", "count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    count: int
    def __init__(self, reason: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class Listening(_message.Message):
    __slots__ = ("port",)
    PORT_FIELD_NUMBER: _ClassVar[int]
    port: int
    def __init__(self, port: _Optional[int] = ...) -> None: ...

class Alive(_message.Message):
    __slots__ = ("stream_count",)
    STREAM_COUNT_FIELD_NUMBER: _ClassVar[int]
    stream_count: int
    def __init__(self, stream_count: _Optional[int] = ...) -> None: ...

class EngineMessage(_message.Message):
    __slots__ = ("state", "outputs", "ended", "abort_outcome", "drain")
    STATE_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ABORT_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    state: GroupState
    outputs: Outputs
    ended: Ended
    abort_outcome: AbortOutcome
    drain: Drain
    def __init__(self, state: _Optional[_Union[GroupState, _Mapping]] = ..., outputs: _Optional[_Union[Outputs, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ..., abort_outcome: _Optional[_Union[AbortOutcome, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ...) -> None: ...

class GroupState(_message.Message):
    __slots__ = ("is_ready", "cause", "server", "max_model_len", "vocab_size")
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    is_ready: bool
    cause: str
    server: _generate_pb2.GetServerInfoResponse
    max_model_len: int
    vocab_size: int
    def __init__(self, is_ready: bool = ..., cause: _Optional[str] = ..., server: _Optional[_Union[_generate_pb2.GetServerInfoResponse, _Mapping]] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class Outputs(_message.Message):
    __slots__ = ("handles", "token_counts", "token_ids", "logprobs", "prompt_pieces")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_PIECES_FIELD_NUMBER: _ClassVar[int]
    handles: bytes
    token_counts: bytes
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[_generate_pb2.TokenLogprobs]
    prompt_pieces: _containers.RepeatedCompositeFieldContainer[PromptPiece]
    def __init__(self, handles: _Optional[bytes] = ..., token_counts: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[_generate_pb2.TokenLogprobs, _Mapping]]] = ..., prompt_pieces: _Optional[_Iterable[_Union[PromptPiece, _Mapping]]] = ...) -> None: ...

class PromptPiece(_message.Message):
    __slots__ = ("handle", "first_position", "token_ids", "logprobs", "top_token_ids", "top_logprobs")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    first_position: int
    token_ids: bytes
    logprobs: bytes
    top_token_ids: bytes
    top_logprobs: bytes
    def __init__(self, handle: _Optional[int] = ..., first_position: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("handle", "finish_reason", "stop_token_id", "status_code", "status_message", "retry_after_seconds", "times")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_CODE_FIELD_NUMBER: _ClassVar[int]
    STATUS_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    handle: int
    finish_reason: _generate_pb2.FinishReason
    stop_token_id: int
    status_code: int
    status_message: str
    retry_after_seconds: float
    times: RequestTimes
    def __init__(self, handle: _Optional[int] = ..., finish_reason: _Optional[_Union[_generate_pb2.FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., status_code: _Optional[int] = ..., status_message: _Optional[str] = ..., retry_after_seconds: _Optional[float] = ..., times: _Optional[_Union[RequestTimes, _Mapping]] = ...) -> None: ...

class RequestTimes(_message.Message):
    __slots__ = ("queue_seconds", "prefill_seconds", "decode_seconds", "comm_share", "step_count", "preemption_count", "cached_token_count", "epoch")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMM_SHARE_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREEMPTION_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    comm_share: float
    step_count: int
    preemption_count: int
    cached_token_count: int
    epoch: int
    def __init__(self, queue_seconds: _Optional[float] = ..., prefill_seconds: _Optional[float] = ..., decode_seconds: _Optional[float] = ..., comm_share: _Optional[float] = ..., step_count: _Optional[int] = ..., preemption_count: _Optional[int] = ..., cached_token_count: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class AbortOutcome(_message.Message):
    __slots__ = ("query", "was_active")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    WAS_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    query: int
    was_active: bool
    def __init__(self, query: _Optional[int] = ..., was_active: bool = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("budget_seconds",)
    BUDGET_SECONDS_FIELD_NUMBER: _ClassVar[int]
    budget_seconds: float
    def __init__(self, budget_seconds: _Optional[float] = ...) -> None: ...
