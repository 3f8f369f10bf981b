"""What a server answers. Names and units are those of protos/lockstep/v1/generate.proto."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why an output ended."""

    STOP = "stop"
    """A stop id or a stop text."""
    LENGTH = "length"
    """`max_tokens`, or the end of the context."""
    ABORTED = "aborted"
    """The Abort call."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one position, of the model's raw distribution."""

    logprob: float
    top_token_ids: tuple[int, ...]
    """The most likely tokens, best first."""
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Those of the prompt's tokens from `first_position` on, one entry a token."""

    first_position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """The request was accepted."""

    request_id: str
    seed: int
    """With it the request can be repeated."""
    prompt_token_count: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Further output of one sample."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    sample_index: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one sample."""

    prompt_token_count: int
    output_token_count: int
    cached_token_count: int


@dataclass(frozen=True, slots=True)
class Finished:
    """How one sample ended; at most one of `stop` and `stop_token_id` is set."""

    finish_reason: FinishReason
    usage: Usage
    stop: str | None = None
    stop_token_id: int | None = None
    sample_index: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One whole output."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finished: Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """All outputs for a prompt."""

    started: Started
    samples: tuple[Sample, ...]
    """At least one."""
    prompt_logprobs: PromptLogprobs | None

    @property
    def text(self) -> str:
        """Of the first sample."""
        return self.samples[0].text


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the model can take."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool
    has_chat_template: bool
    model_digest: str


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One rank of the group."""

    rank: int
    address: str
    pid: int
    device: str
    is_up: bool
    local_q_head_count: int
    local_kv_head_count: int
    parameter_count: int
    bytes_read: int
    all_reduce_count: int
    version: str
    host: str
    memory_bytes: Mapping[str, int]
    last_error: str


@dataclass(frozen=True, slots=True)
class CommTime:
    """How long a collective of one size takes."""

    byte_count: int
    microseconds: float


@dataclass(frozen=True, slots=True)
class CommPath:
    """One way of one collective."""

    operation: str
    path: str
    is_usable: bool
    detail: str
    serves_up_to_byte_count: int
    times: tuple[CommTime, ...]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the server is."""

    version: str
    is_ready: bool
    epoch: int
    ranks: tuple[RankInfo, ...]
    running_count: int
    waiting_count: int
    block_count: int
    block_size: int
    max_num_seqs: int
    comm_paths: tuple[CommPath, ...]
    kv_cache_usage: float
    cause: str
    last_loss: str
    pid: int
    pid_start_ticks: int
    boot_id: str
    is_draining: bool
    last_stall: str


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is after its context."""

    token_ids: tuple[int, ...]
    """Of the continuation."""
    logprobs: tuple[float, ...]
    """Natural logarithms, one a token, each given all tokens before it."""
    is_greedy: bool
    """Every token is the most likely one at its place."""

    @property
    def logprob(self) -> float:
        """Of the continuation as a whole."""
        return sum(self.logprobs)
