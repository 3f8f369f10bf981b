"""Checks requests and fills in what they leave out. Pure functions: no clock, no I/O.

Every refusal is a BadRequest that names the field, its value and the limit.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from coordinator.errors import BadRequest, TextUnavailable
from coordinator.frontend.generation_defaults import GenerationDefaults
from coordinator.sampling_limits import (
    BIAS_RANGE,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_BIASED_IDS,
    MAX_CHOICES,
    MAX_CONSTRAINT_BYTES,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_SAMPLES,
    MAX_STOP_IDS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_TENANT_CHARS,
    SAMPLING_RANGES,
    Range,
)

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class ModelLimits:
    """What requests are checked against."""

    vocab_size: int
    """Ids are in [0, vocab_size): rows of the model, which may be more than the tokenizer's."""
    max_model_len: int
    """Longest prompt + output, in tokens."""
    longest_token_chars: int | None
    """`Tokenizer.longest_token_chars`; None without a tokenizer."""


@dataclass(frozen=True)
class Constraint:
    """What the output must be: the field of the public SamplingParams, and what it holds."""

    kind: str
    value: Any
    """A text; for `json_object` true; for `choice` a ChoiceConstraint."""

    @property
    def texts(self) -> Sequence[str]:
        """The definition."""
        match self.kind:
            case "json_object":
                return ()
            case "choice":
                choices: Sequence[str] = self.value.choices
                return choices
        return (self.value,)


@dataclass(frozen=True)
class RequestFields:
    """Sampling parameters as a request states them; None is what it left out."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    include_stop: bool | None = None
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters with every value resolved and in range."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int
    min_tokens: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    """The checkpoint's end-of-sequence ids, unless ignored, and the request's own; no doubles."""
    ignore_eos: bool
    num_logprobs: int | None
    """None: none wanted."""
    num_samples: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of an id and what is added to its logit, by rising id."""
    bad_words: tuple[str, ...] = ()
    include_stop: bool = False
    constraint: Constraint | None = None
    num_prompt_logprobs: int | None = None
    """None: none wanted."""

    def sample_seed(self, sample_index: int) -> int:
        """The sample's own seed, in signed 64 bits as the noise takes it."""
        return (self.seed + sample_index + 2**63) % 2**64 - 2**63


def random_seed() -> int:
    """A seed for a request that brought none, in [0, 2**63)."""
    return secrets.randbits(63)


def resolve_sampling(
    fields: RequestFields,
    defaults: GenerationDefaults,
    limits: ModelLimits,
    num_prompt_tokens: int,
    num_resumed_tokens: int = 0,
    draw_seed: Callable[[], int] = random_seed,
) -> SamplingParams:
    """Fills in defaults and checks every value; the prompt's length is checked as well.

    A request without `max_tokens` gets what fits the context; what it resumes may be a whole
    output, of which only the end was lost. Raises BadRequest, TextUnavailable (stop strings
    without a tokenizer).
    """
    check_prompt_length(num_prompt_tokens, limits)
    max_tokens = _max_tokens(fields, limits, num_prompt_tokens)
    if num_resumed_tokens > max_tokens:
        limit = f"at most max_tokens, which is {max_tokens}"
        raise BadRequest("resume_output_ids", num_resumed_tokens, limit, "number of")
    min_tokens = 0 if fields.min_tokens is None else fields.min_tokens
    if not 0 <= min_tokens <= max_tokens:
        limit = f"at least 0 and at most max_tokens, which is {max_tokens}"
        raise BadRequest("min_tokens", min_tokens, limit)
    seed = draw_seed() if fields.seed is None else fields.seed
    if not -(2**63) <= seed < 2**63:
        raise BadRequest("seed", seed, "a signed 64-bit integer")
    for name, count in (("logprobs", fields.logprobs), ("prompt_logprobs", fields.prompt_logprobs)):
        if count is not None:
            Range(0, MAX_LOGPROBS).check(name, count)
    num_samples = 1 if fields.n is None else fields.n
    Range(1, MAX_SAMPLES).check("n", num_samples)
    if num_resumed_tokens and num_samples > 1:
        raise BadRequest("n", num_samples, "1 with resume_output_ids, which are of one sample")
    if num_resumed_tokens and fields.prompt_logprobs is not None:
        limit = "unset with resume_output_ids: they came before the first output id"
        raise BadRequest("prompt_logprobs", fields.prompt_logprobs, limit)
    ignore_eos = bool(fields.ignore_eos)
    return SamplingParams(
        temperature=_in_range("temperature", fields.temperature, defaults.temperature),
        top_p=_in_range("top_p", fields.top_p, defaults.top_p),
        top_k=_in_range("top_k", fields.top_k, defaults.top_k),
        min_p=_in_range("min_p", fields.min_p, defaults.min_p),
        seed=seed,
        repetition_penalty=_in_range(
            "repetition_penalty", fields.repetition_penalty, defaults.repetition_penalty
        ),
        presence_penalty=_in_range("presence_penalty", fields.presence_penalty, 0.0),
        frequency_penalty=_in_range("frequency_penalty", fields.frequency_penalty, 0.0),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=_stop_strings(fields.stop, limits),
        stop_ids=_stop_ids(fields, () if ignore_eos else defaults.eos_token_ids, limits),
        ignore_eos=ignore_eos,
        num_logprobs=fields.logprobs,
        num_samples=num_samples,
        logit_bias=_logit_bias(fields.logit_bias, limits),
        bad_words=_bad_words(fields.bad_words, limits),
        include_stop=bool(fields.include_stop),
        constraint=_constraint(fields, limits),
        num_prompt_logprobs=fields.prompt_logprobs,
    )


def check_scheduling(priority: int, tenant: str) -> None:
    """Refuses what the queue cannot order by."""
    Range(-MAX_PRIORITY, MAX_PRIORITY).check("priority", priority)
    if len(tenant) > MAX_TENANT_CHARS:
        raise BadRequest("tenant", tenant, f"at most {MAX_TENANT_CHARS} characters long")


def check_text(field: str, text: str, limits: ModelLimits) -> None:
    """Refuses, before any work on it, text that is empty, too long or not Unicode.

    Raises TextUnavailable without a tokenizer.
    """
    if not text:
        raise BadRequest(field, text, "not empty")
    check_text_length(field, len(text), limits)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(field, text[error.start], "free of lone surrogates") from error


def check_text_length(field: str, num_chars: int, limits: ModelLimits) -> None:
    """Refuses more characters (a chat's in all) than the context could hold in its longest tokens.

    Raises TextUnavailable without a tokenizer.
    """
    longest = _require_tokenizer(field, limits)
    most = limits.max_model_len * longest
    if num_chars > most:
        limit = (
            f"at most {most} characters: {limits.max_model_len} tokens of context, "
            f"{longest} characters in the longest token"
        )
        raise BadRequest(field, num_chars, limit, "length of")


def check_token_ids(
    field: str, token_ids: Iterable[int] | npt.NDArray[np.int64], limits: ModelLimits
) -> npt.NDArray[np.int32]:
    """The ids as int32 [num_ids], if all are in the vocabulary."""
    ids = np.asarray(
        token_ids if isinstance(token_ids, np.ndarray) else list(token_ids), dtype=np.int64
    )
    wrong = np.flatnonzero((ids < 0) | (ids >= limits.vocab_size))
    if wrong.size:
        limit = f"an id in the vocabulary, 0 to {limits.vocab_size - 1}"
        raise BadRequest(f"{field}[{wrong[0]}]", int(ids[wrong[0]]), limit)
    return ids.astype(np.int32)


def check_prompt_length(num_prompt_tokens: int, limits: ModelLimits) -> None:
    """A prompt has a token, and leaves room for one."""
    most = limits.max_model_len - 1
    if not 1 <= num_prompt_tokens <= most:
        limit = f"at least 1 and at most {most} (max_model_len {limits.max_model_len} less 1)"
        raise BadRequest("prompt", num_prompt_tokens, limit, "number of tokens in")


def _max_tokens(fields: RequestFields, limits: ModelLimits, num_prompt_tokens: int) -> int:
    room = limits.max_model_len - num_prompt_tokens
    if fields.max_tokens is None:
        return room
    if not 1 <= fields.max_tokens <= room:
        limit = (
            f"at least 1 and at most {room} "
            f"(max_model_len {limits.max_model_len} less {num_prompt_tokens} prompt tokens)"
        )
        raise BadRequest("max_tokens", fields.max_tokens, limit)
    return fields.max_tokens


def _in_range(name: str, given: _Number | None, default: _Number) -> _Number:
    if given is None:
        return default
    SAMPLING_RANGES[name].check(name, given)
    return given


def _require_tokenizer(wanted_by: str, limits: ModelLimits) -> int:
    """The length of the longest token; raises TextUnavailable without a tokenizer."""
    if limits.longest_token_chars is None:
        raise TextUnavailable(f"{wanted_by} needs a tokenizer, and this checkpoint has none")
    return limits.longest_token_chars


def _check_texts(
    field: str, texts: Sequence[str], most: int, most_chars: int, least: int = 0
) -> tuple[str, ...]:
    """The texts without doubles, if they are as many and as long as they may be."""
    if not least <= len(texts) <= most:
        limit = f"{least} to {most}" if least else f"at most {most}"
        raise BadRequest(field, len(texts), limit, "number of")
    for index, text in enumerate(texts):
        if not 1 <= len(text) <= most_chars:
            raise BadRequest(f"{field}[{index}]", text, f"1 to {most_chars} characters long")
    return tuple(dict.fromkeys(texts))


def _stop_strings(stops: Sequence[str], limits: ModelLimits) -> tuple[str, ...]:
    if stops:
        _require_tokenizer("stop", limits)
    return _check_texts("stop", stops, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)


def _logit_bias(bias: Mapping[int, float], limits: ModelLimits) -> tuple[tuple[int, float], ...]:
    if len(bias) > MAX_BIASED_IDS:
        raise BadRequest("logit_bias", len(bias), f"at most {MAX_BIASED_IDS}", "number of")
    for token_id, value in bias.items():
        if not 0 <= token_id < limits.vocab_size:
            limit = f"an id in the vocabulary, 0 to {limits.vocab_size - 1}"
            raise BadRequest("logit_bias", token_id, limit, "id in")
        BIAS_RANGE.check(f"logit_bias[{token_id}]", value)
    return tuple(sorted(bias.items()))


def _bad_words(words: Sequence[str], limits: ModelLimits) -> tuple[str, ...]:
    if words:
        _require_tokenizer("bad_words", limits)
    return _check_texts("bad_words", words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)


def _constraint(fields: RequestFields, limits: ModelLimits) -> Constraint | None:
    """Checks sizes; whether the definition makes sense, the grammar process says."""
    constraint = fields.constraint
    if constraint is None:
        return None
    _require_tokenizer(constraint.kind, limits)
    if fields.ignore_eos:
        limit = f"false with {constraint.kind}, which ends at an end-of-sequence id"
        raise BadRequest("ignore_eos", True, limit)
    if constraint.kind == "choice":
        _check_texts("choice.choices", constraint.texts, MAX_CHOICES, MAX_CONSTRAINT_BYTES, least=1)
    size = len("".join(constraint.texts).encode())
    if size > MAX_CONSTRAINT_BYTES:
        raise BadRequest(constraint.kind, size, f"at most {MAX_CONSTRAINT_BYTES}", "bytes of")
    return constraint


def _stop_ids(
    fields: RequestFields, eos_token_ids: tuple[int, ...], limits: ModelLimits
) -> tuple[int, ...]:
    own = check_token_ids("stop_token_ids", fields.stop_token_ids, limits).tolist()
    stop_ids = tuple(dict.fromkeys([*eos_token_ids, *own]))
    if len(stop_ids) > MAX_STOP_IDS:
        limit = f"at most {MAX_STOP_IDS}, of which {len(eos_token_ids)} are end-of-sequence ids"
        raise BadRequest("stop_token_ids", len(stop_ids), limit, "number of")
    return stop_ids
