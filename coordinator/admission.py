"""May a request enter the queue? Reads a Submit into a Request, or says why not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from coordinator.errors import CoordinatorError
from coordinator.precedence import virtual_arrival
from coordinator.request import Request, Sampling
from coordinator.sampling_limits import (
    BIAS_RANGE,
    MAX_BAD_WORD_IDS,
    MAX_BAD_WORD_SEQUENCES,
    MAX_BIASED_IDS,
    MAX_INT32,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_STOP_IDS,
    SAMPLING_RANGES,
    Range,
)
from protos.lockstep.v1 import engine_pb2, generate_pb2

# A parameter outside these is refused by the ranks, and a refused command costs the whole group.
_RANGES = {**SAMPLING_RANGES, "min_tokens": Range(0, MAX_INT32)}


class Refused(CoordinatorError):
    """A request does not enter the queue.

    `reason` is a metric's label, `field` what is at fault in a bad request.
    """

    def __init__(
        self,
        status: grpc.StatusCode,
        reason: str,
        message: str,
        retry_after_s: float = 0.0,
        field: str = "",
    ) -> None:
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.field = field
        super().__init__(message)


@dataclass(frozen=True)
class ModelLimits:
    """What the group can take; `num_blocks` counts the dummy."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int


def read_submit(submit: engine_pb2.Submit, frontend: int, limits: ModelLimits) -> Request:
    """The request's record; raises Refused with INVALID_ARGUMENT naming field, value and limit.

    Frontends validate first, with better words and before tokenising; what is repeated here is what
    would otherwise reach the ranks. The record's order is not unique yet.
    """
    params = submit.sampling_params
    stop_ids = tuple(_token_ids(submit.stop_ids, "stop_token_ids", limits.vocab_size).tolist())
    few = f"{len(stop_ids)} stop ids; at most {MAX_STOP_IDS}"
    _require(len(stop_ids) <= MAX_STOP_IDS, "stop_token_ids", few)
    resumed = _token_ids(submit.resume_output_ids, "resume_output_ids", limits.vocab_size)
    _require(
        abs(submit.priority) <= MAX_PRIORITY,
        "priority",
        f"priority is {submit.priority}; it must be {-MAX_PRIORITY} to {MAX_PRIORITY}",
    )
    num_logprobs = params.logprobs if params.HasField("logprobs") else -1
    num_prompt_logprobs = params.prompt_logprobs if params.HasField("prompt_logprobs") else -1
    for field, count in (("logprobs", num_logprobs), ("prompt_logprobs", num_prompt_logprobs)):
        _require(count <= MAX_LOGPROBS, field, f"{field} {count} is above {MAX_LOGPROBS}")
    request = Request(
        order=virtual_arrival(submit.arrival_time, submit.priority),
        frontend=frontend,
        handle=submit.handle,
        request_id=submit.request_id,
        prompt_ids=_token_ids(submit.prompt_ids, "prompt", limits.vocab_size),
        max_tokens=params.max_tokens,
        sampling=Sampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            min_tokens=params.min_tokens,
            stop_ids=stop_ids,
            num_logprobs=num_logprobs,
            logit_bias=_logit_bias(params.logit_bias, limits.vocab_size),
            bad_words=_bad_words(submit.bad_words, limits.vocab_size),
            num_prompt_logprobs=num_prompt_logprobs,
        ),
        arrival_time=submit.arrival_time,
        tenant=submit.tenant,
        use_prefix_cache=submit.use_prefix_cache,
        group=submit.group or submit.handle,
        deadline=submit.deadline,
        output_ids=resumed.tolist(),
        num_resumed=len(resumed),
        constraint=_constraint(params, stop_ids),
    )
    _check_sampling(request.sampling)
    _check_lengths(request, limits)
    return request


def _token_ids(packed: bytes, field: str, vocab_size: int) -> np.ndarray:
    _require(len(packed) % 4 == 0, field, f"{field} holds {len(packed)} bytes, not whole int32")
    token_ids = np.frombuffer(packed, dtype="<i4")
    if len(token_ids) and token_ids.view("<u4").max() >= vocab_size:  # negative ones are huge then
        outside = token_ids[(token_ids < 0) | (token_ids >= vocab_size)]
        words = f"{field} holds id {outside[0]}; ids are in [0, {vocab_size})"
        raise _refusal(field, words)
    return token_ids


def _constraint(
    params: generate_pb2.SamplingParams, stop_ids: Sequence[int]
) -> generate_pb2.SamplingParams | None:
    """What a grammar process needs of the parameters; None without a constraint."""
    kind = params.WhichOneof("constraint")
    if kind is None:
        return None
    return generate_pb2.SamplingParams(
        min_tokens=params.min_tokens, stop_token_ids=stop_ids, **{kind: getattr(params, kind)}
    )


def _logit_bias(bias: Mapping[int, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    few = f"{len(bias)} biases; at most {MAX_BIASED_IDS}"
    _require(len(bias) <= MAX_BIASED_IDS, "logit_bias", few)
    for token_id, value in bias.items():
        known = f"bias of id {token_id}; ids are in [0, {vocab_size})"
        _require(0 <= token_id < vocab_size, "logit_bias", known)
        small = f"logit_bias is {value:g}; it must be {BIAS_RANGE}"
        _require(value in BIAS_RANGE, "logit_bias", small)
    return tuple(sorted(bias.items()))


def _bad_words(words: Sequence[bytes], vocab_size: int) -> tuple[tuple[int, ...], ...]:
    _require(
        len(words) <= MAX_BAD_WORD_SEQUENCES,
        "bad_words",
        f"{len(words)} bad words; at most {MAX_BAD_WORD_SEQUENCES}",
    )
    sequences = [_token_ids(word, "bad_words", vocab_size).tolist() for word in words]
    for ids in sequences:
        _require(
            1 <= len(ids) <= MAX_BAD_WORD_IDS,
            "bad_words",
            f"a bad word has {len(ids)} ids; it must have 1 to {MAX_BAD_WORD_IDS}",
        )
    return tuple(map(tuple, sequences))


def _check_sampling(sampling: Sampling) -> None:
    for field, limits in _RANGES.items():
        value = getattr(sampling, field)
        if value not in limits:  # the words cost more than the check, and there are many fields
            raise _refusal(field, f"{field} is {value:g}; it must be {limits}")


def _check_lengths(request: Request, limits: ModelLimits) -> None:
    _require(request.prompt_len > 0, "prompt", "the prompt is empty; it must hold a token")
    _require(
        request.max_tokens >= 1,
        "max_tokens",
        f"max_tokens is {request.max_tokens}; it must be at least 1",
    )
    total = request.prompt_len + request.max_tokens
    _require(
        total <= limits.max_model_len,
        "max_tokens",
        f"prompt ({request.prompt_len}) and max_tokens ({request.max_tokens}) make {total} tokens; "
        f"the context holds {limits.max_model_len}",
    )
    num_needed = -(-request.final_limit // limits.block_size)
    num_usable = limits.num_blocks - 1
    _require(
        num_needed <= num_usable,
        "max_tokens",
        f"the request could never fit: {total} tokens need {num_needed} KV blocks of "
        f"{limits.block_size}, there are {num_usable}",
    )


def _require(is_met: bool, field: str, message: str) -> None:
    if not is_met:
        raise _refusal(field, message)


def _refusal(field: str, message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "invalid_argument", message, field=field)
