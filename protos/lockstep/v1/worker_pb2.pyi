from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_PHASE_UNSPECIFIED: _ClassVar[WorkerPhase]
    WORKER_PHASE_STARTED: _ClassVar[WorkerPhase]
    WORKER_PHASE_LOADED: _ClassVar[WorkerPhase]
    WORKER_PHASE_JOINED: _ClassVar[WorkerPhase]
    WORKER_PHASE_CAPTURED: _ClassVar[WorkerPhase]
    WORKER_PHASE_READY: _ClassVar[WorkerPhase]
    WORKER_PHASE_FAILED: _ClassVar[WorkerPhase]
WORKER_PHASE_UNSPECIFIED: WorkerPhase
WORKER_PHASE_STARTED: WorkerPhase
WORKER_PHASE_LOADED: WorkerPhase
WORKER_PHASE_JOINED: WorkerPhase
WORKER_PHASE_CAPTURED: WorkerPhase
WORKER_PHASE_READY: WorkerPhase
WORKER_PHASE_FAILED: WorkerPhase

class HelloRequest(_message.Message):
    __slots__ = ("version", "model_digest", "epoch", "rank", "world_size")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    version: str
    model_digest: str
    epoch: int
    rank: int
    world_size: int
    def __init__(self, version: _Optional[str] = ..., model_digest: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("version", "model_digest", "last_epoch", "phase", "pid", "pid_start_ticks", "boot_id", "host", "device", "device_uuid", "last_error")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PID_START_TICKS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    version: str
    model_digest: str
    last_epoch: int
    phase: WorkerPhase
    pid: int
    pid_start_ticks: int
    boot_id: str
    host: str
    device: str
    device_uuid: str
    last_error: str
    def __init__(self, version: _Optional[str] = ..., model_digest: _Optional[str] = ..., last_epoch: _Optional[int] = ..., phase: _Optional[_Union[WorkerPhase, str]] = ..., pid: _Optional[int] = ..., pid_start_ticks: _Optional[int] = ..., boot_id: _Optional[str] = ..., host: _Optional[str] = ..., device: _Optional[str] = ..., device_uuid: _Optional[str] = ..., last_error: _Optional[str] = ...) -> None: ...

class EngineConfig(_message.Message):
    __slots__ = ("dtype", "block_size", "max_num_seqs", "max_batch_tokens", "max_model_len", "load_format", "comm", "gpu_memory_fraction", "kv_cache_bytes", "use_graphs")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    LOAD_FORMAT_FIELD_NUMBER: _ClassVar[int]
    COMM_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_FRACTION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    USE_GRAPHS_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    load_format: str
    comm: str
    gpu_memory_fraction: float
    kv_cache_bytes: int
    use_graphs: bool
    def __init__(self, dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_model_len: _Optional[int] = ..., load_format: _Optional[str] = ..., comm: _Optional[str] = ..., gpu_memory_fraction: _Optional[float] = ..., kv_cache_bytes: _Optional[int] = ..., use_graphs: bool = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("epoch", "config")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    config: EngineConfig
    def __init__(self, epoch: _Optional[int] = ..., config: _Optional[_Union[EngineConfig, _Mapping]] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("local_q_head_count", "local_kv_head_count", "parameter_count", "bytes_read", "seconds", "block_bytes", "vocab_size")
    LOCAL_Q_HEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_KV_HEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    local_q_head_count: int
    local_kv_head_count: int
    parameter_count: int
    bytes_read: int
    seconds: float
    block_bytes: int
    vocab_size: int
    def __init__(self, local_q_head_count: _Optional[int] = ..., local_kv_head_count: _Optional[int] = ..., parameter_count: _Optional[int] = ..., bytes_read: _Optional[int] = ..., seconds: _Optional[float] = ..., block_bytes: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class CreateGroupIdRequest(_message.Message):
    __slots__ = ("epoch", "host")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    host: str
    def __init__(self, epoch: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...

class CreateGroupIdResponse(_message.Message):
    __slots__ = ("group_id",)
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    group_id: bytes
    def __init__(self, group_id: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("epoch", "group", "group_id", "timeout_seconds")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    group: int
    group_id: bytes
    timeout_seconds: float
    def __init__(self, epoch: _Optional[int] = ..., group: _Optional[int] = ..., group_id: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class PreflightRequest(_message.Message):
    __slots__ = ("epoch", "timeout_seconds")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    timeout_seconds: float
    def __init__(self, epoch: _Optional[int] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class PreflightResponse(_message.Message):
    __slots__ = ("paths", "routes")
    PATHS_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    paths: _containers.RepeatedCompositeFieldContainer[PathReport]
    routes: _containers.RepeatedCompositeFieldContainer[PathRoute]
    def __init__(self, paths: _Optional[_Iterable[_Union[PathReport, _Mapping]]] = ..., routes: _Optional[_Iterable[_Union[PathRoute, _Mapping]]] = ...) -> None: ...

class PathReport(_message.Message):
    __slots__ = ("path", "is_usable", "detail", "operation", "times")
    PATH_FIELD_NUMBER: _ClassVar[int]
    IS_USABLE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    path: str
    is_usable: bool
    detail: str
    operation: str
    times: _containers.RepeatedCompositeFieldContainer[PathTime]
    def __init__(self, path: _Optional[str] = ..., is_usable: bool = ..., detail: _Optional[str] = ..., operation: _Optional[str] = ..., times: _Optional[_Iterable[_Union[PathTime, _Mapping]]] = ...) -> None: ...

class PathTime(_message.Message):
    __slots__ = ("byte_count", "microseconds")
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    MICROSECONDS_FIELD_NUMBER: _ClassVar[int]
    byte_count: int
    microseconds: float
    def __init__(self, byte_count: _Optional[int] = ..., microseconds: _Optional[float] = ...) -> None: ...

class PathRoute(_message.Message):
    __slots__ = ("operation", "max_byte_count", "path")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    operation: str
    max_byte_count: int
    path: str
    def __init__(self, operation: _Optional[str] = ..., max_byte_count: _Optional[int] = ..., path: _Optional[str] = ...) -> None: ...

class CaptureRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class CaptureResponse(_message.Message):
    __slots__ = ("padded_sizes", "seconds", "max_block_count", "memory_bytes")
    class MemoryBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PADDED_SIZES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    padded_sizes: _containers.RepeatedScalarFieldContainer[int]
    seconds: float
    max_block_count: int
    memory_bytes: _containers.ScalarMap[str, int]
    def __init__(self, padded_sizes: _Optional[_Iterable[int]] = ..., seconds: _Optional[float] = ..., max_block_count: _Optional[int] = ..., memory_bytes: _Optional[_Mapping[str, int]] = ...) -> None: ...

class InitKvCacheRequest(_message.Message):
    __slots__ = ("epoch", "block_count")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    block_count: int
    def __init__(self, epoch: _Optional[int] = ..., block_count: _Optional[int] = ...) -> None: ...

class InitKvCacheResponse(_message.Message):
    __slots__ = ("kv_cache_bytes",)
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    kv_cache_bytes: int
    def __init__(self, kv_cache_bytes: _Optional[int] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("command",)
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    command: StepCommand
    def __init__(self, command: _Optional[_Union[StepCommand, _Mapping]] = ...) -> None: ...

class StepCommand(_message.Message):
    __slots__ = ("command_id", "epoch", "first_step", "step_count", "delta", "digest", "table_digest")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TABLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    epoch: int
    first_step: int
    step_count: int
    delta: bytes
    digest: bytes
    table_digest: bytes
    def __init__(self, command_id: _Optional[int] = ..., epoch: _Optional[int] = ..., first_step: _Optional[int] = ..., step_count: _Optional[int] = ..., delta: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., table_digest: _Optional[bytes] = ...) -> None: ...

class TableDelta(_message.Message):
    __slots__ = ("closed_slots", "opened_slots", "block_appends", "limits", "row_changes", "row_count", "chunks", "chunk_token_ids", "masks", "prompt_targets")
    CLOSED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    OPENED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_APPENDS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    ROW_CHANGES_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TARGETS_FIELD_NUMBER: _ClassVar[int]
    closed_slots: bytes
    opened_slots: _containers.RepeatedCompositeFieldContainer[SlotOpen]
    block_appends: bytes
    limits: bytes
    row_changes: bytes
    row_count: int
    chunks: bytes
    chunk_token_ids: bytes
    masks: _containers.RepeatedCompositeFieldContainer[SlotMask]
    prompt_targets: bytes
    def __init__(self, closed_slots: _Optional[bytes] = ..., opened_slots: _Optional[_Iterable[_Union[SlotOpen, _Mapping]]] = ..., block_appends: _Optional[bytes] = ..., limits: _Optional[bytes] = ..., row_changes: _Optional[bytes] = ..., row_count: _Optional[int] = ..., chunks: _Optional[bytes] = ..., chunk_token_ids: _Optional[bytes] = ..., masks: _Optional[_Iterable[_Union[SlotMask, _Mapping]]] = ..., prompt_targets: _Optional[bytes] = ...) -> None: ...

class SlotMask(_message.Message):
    __slots__ = ("slot", "bits", "ids")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    BITS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    bits: bytes
    ids: bytes
    def __init__(self, slot: _Optional[int] = ..., bits: _Optional[bytes] = ..., ids: _Optional[bytes] = ...) -> None: ...

class SlotOpen(_message.Message):
    __slots__ = ("slot", "prompt_len", "prefill_len", "limit", "block_ids", "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "stop_ids", "logprob_count", "cached_len", "cached_token_ids", "bias_ids", "bias_values", "bad_words", "recent_output_ids", "is_constrained")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LEN_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_LEN_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    RECENT_OUTPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    IS_CONSTRAINED_FIELD_NUMBER: _ClassVar[int]
    slot: int
    prompt_len: int
    prefill_len: int
    limit: int
    block_ids: bytes
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_tokens: int
    stop_ids: bytes
    logprob_count: int
    cached_len: int
    cached_token_ids: bytes
    bias_ids: bytes
    bias_values: bytes
    bad_words: _containers.RepeatedScalarFieldContainer[bytes]
    recent_output_ids: bytes
    is_constrained: bool
    def __init__(self, slot: _Optional[int] = ..., prompt_len: _Optional[int] = ..., prefill_len: _Optional[int] = ..., limit: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., min_tokens: _Optional[int] = ..., stop_ids: _Optional[bytes] = ..., logprob_count: _Optional[int] = ..., cached_len: _Optional[int] = ..., cached_token_ids: _Optional[bytes] = ..., bias_ids: _Optional[bytes] = ..., bias_values: _Optional[bytes] = ..., bad_words: _Optional[_Iterable[bytes]] = ..., recent_output_ids: _Optional[bytes] = ..., is_constrained: bool = ...) -> None: ...

class ExecuteResponse(_message.Message):
    __slots__ = ("result", "progress", "failure", "earlier_results")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    EARLIER_RESULTS_FIELD_NUMBER: _ClassVar[int]
    result: StepResult
    progress: RankProgress
    failure: RankFailure
    earlier_results: _containers.RepeatedCompositeFieldContainer[StepResult]
    def __init__(self, result: _Optional[_Union[StepResult, _Mapping]] = ..., progress: _Optional[_Union[RankProgress, _Mapping]] = ..., failure: _Optional[_Union[RankFailure, _Mapping]] = ..., earlier_results: _Optional[_Iterable[_Union[StepResult, _Mapping]]] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("command_id", "step", "token_ids", "flags", "logprobs", "top_token_ids", "top_logprobs", "step_micros", "all_reduce_count", "arrival_micros", "idle_micros", "comm_micros", "prompt_logprobs", "prompt_top_token_ids", "prompt_top_logprobs", "collective_count", "collective_micros")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STEP_MICROS_FIELD_NUMBER: _ClassVar[int]
    ALL_REDUCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_MICROS_FIELD_NUMBER: _ClassVar[int]
    IDLE_MICROS_FIELD_NUMBER: _ClassVar[int]
    COMM_MICROS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_COUNT_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_MICROS_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    step: int
    token_ids: bytes
    flags: bytes
    logprobs: bytes
    top_token_ids: bytes
    top_logprobs: bytes
    step_micros: int
    all_reduce_count: int
    arrival_micros: int
    idle_micros: int
    comm_micros: int
    prompt_logprobs: bytes
    prompt_top_token_ids: bytes
    prompt_top_logprobs: bytes
    collective_count: int
    collective_micros: int
    def __init__(self, command_id: _Optional[int] = ..., step: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., flags: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ..., step_micros: _Optional[int] = ..., all_reduce_count: _Optional[int] = ..., arrival_micros: _Optional[int] = ..., idle_micros: _Optional[int] = ..., comm_micros: _Optional[int] = ..., prompt_logprobs: _Optional[bytes] = ..., prompt_top_token_ids: _Optional[bytes] = ..., prompt_top_logprobs: _Optional[bytes] = ..., collective_count: _Optional[int] = ..., collective_micros: _Optional[int] = ...) -> None: ...

class RankProgress(_message.Message):
    __slots__ = ("command_id", "step", "step_micros", "all_reduce_count", "arrival_micros", "idle_micros", "comm_micros", "collective_count", "collective_micros")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_MICROS_FIELD_NUMBER: _ClassVar[int]
    ALL_REDUCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_MICROS_FIELD_NUMBER: _ClassVar[int]
    IDLE_MICROS_FIELD_NUMBER: _ClassVar[int]
    COMM_MICROS_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_COUNT_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_MICROS_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    step: int
    step_micros: int
    all_reduce_count: int
    arrival_micros: int
    idle_micros: int
    comm_micros: int
    collective_count: int
    collective_micros: int
    def __init__(self, command_id: _Optional[int] = ..., step: _Optional[int] = ..., step_micros: _Optional[int] = ..., all_reduce_count: _Optional[int] = ..., arrival_micros: _Optional[int] = ..., idle_micros: _Optional[int] = ..., comm_micros: _Optional[int] = ..., collective_count: _Optional[int] = ..., collective_micros: _Optional[int] = ...) -> None: ...

class RankFailure(_message.Message):
    __slots__ = ("command_id", "step", "is_refusal", "message")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    IS_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    step: int
    is_refusal: bool
    message: str
    def __init__(self, command_id: _Optional[int] = ..., step: _Optional[int] = ..., is_refusal: bool = ..., message: _Optional[str] = ...) -> None: ...

class QuiesceRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class QuiesceResponse(_message.Message):
    __slots__ = ("last_error", "last_step", "is_drained")
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINED_FIELD_NUMBER: _ClassVar[int]
    last_error: str
    last_step: int
    is_drained: bool
    def __init__(self, last_error: _Optional[str] = ..., last_step: _Optional[int] = ..., is_drained: bool = ...) -> None: ...

class DumpFlightRecorderRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DumpFlightRecorderResponse(_message.Message):
    __slots__ = ("collectives", "now_nanos", "ended_count", "ended_micros")
    COLLECTIVES_FIELD_NUMBER: _ClassVar[int]
    NOW_NANOS_FIELD_NUMBER: _ClassVar[int]
    ENDED_COUNT_FIELD_NUMBER: _ClassVar[int]
    ENDED_MICROS_FIELD_NUMBER: _ClassVar[int]
    collectives: _containers.RepeatedCompositeFieldContainer[CollectiveRecord]
    now_nanos: int
    ended_count: int
    ended_micros: int
    def __init__(self, collectives: _Optional[_Iterable[_Union[CollectiveRecord, _Mapping]]] = ..., now_nanos: _Optional[int] = ..., ended_count: _Optional[int] = ..., ended_micros: _Optional[int] = ...) -> None: ...

class CollectiveRecord(_message.Message):
    __slots__ = ("sequence", "operation", "path", "byte_count", "begun_nanos", "ended_nanos")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    BEGUN_NANOS_FIELD_NUMBER: _ClassVar[int]
    ENDED_NANOS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    operation: str
    path: str
    byte_count: int
    begun_nanos: int
    ended_nanos: int
    def __init__(self, sequence: _Optional[int] = ..., operation: _Optional[str] = ..., path: _Optional[str] = ..., byte_count: _Optional[int] = ..., begun_nanos: _Optional[int] = ..., ended_nanos: _Optional[int] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class ShutdownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
