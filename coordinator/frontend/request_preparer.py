"""A client's message to what the engine takes: checked, tokenised, every parameter resolved."""

import asyncio
import dataclasses
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from coordinator.errors import BadRequest
from coordinator.frontend.availability import Availability
from coordinator.frontend.bad_words import bad_word_ids
from coordinator.frontend.chat_template import encode_chat
from coordinator.frontend.checkpoint_text import CheckpointText
from coordinator.frontend.output_assembler import OutputAssembler
from coordinator.frontend.output_stream import OutputStream
from coordinator.frontend.validation import (
    Constraint,
    ModelLimits,
    RequestFields,
    SamplingParams,
    check_prompt_length,
    check_scheduling,
    check_text,
    check_text_length,
    check_token_ids,
    resolve_sampling,
)
from coordinator.sampling_limits import MAX_STOP_IDS
from protos.lockstep.v1 import engine_pb2, generate_pb2

MAX_REQUEST_ID_CHARS = 256

_Ids = npt.NDArray[np.int32]
_T = TypeVar("_T")


@dataclass(frozen=True)
class PreparedRequest:
    """A request ready for the engine, and what will turn its ids into the client's events.

    One entry a sample in `submits` and `outputs`.
    """

    submits: list[engine_pb2.Submit]
    started: generate_pb2.Started
    outputs: list[OutputStream]
    wants_logprobs: bool
    is_complete: bool
    """The resumed output already holds a stop text: nothing is left to generate."""


@dataclass(frozen=True)
class CallClock:
    """CLOCK_MONOTONIC, in seconds: when a call arrived, and when its deadline passes (0: none)."""

    arrival_time: float
    deadline: float


@dataclass(frozen=True)
class Dialect:
    """What another protocol means differently; the defaults are `lockstep.v1`."""

    clamps_max_tokens: bool = False
    """More than the context holds means what it holds; else it is refused."""
    skip_special_tokens: bool = True
    """Stop texts are searched for in text without control tokens."""
    ids_through_stop: bool = False
    """The output's ids go up to the one that completes a stop text; else they end before it."""


class RequestPreparer:
    """Prepares requests on the event loop; tokenising runs on `executor`, after a length check."""

    def __init__(
        self,
        text: CheckpointText,
        availability: Availability,
        served_model_name: str,
        executor: Executor,
    ) -> None:
        self._text = text
        self._availability = availability
        self._served_model_name = served_model_name
        self._executor = executor

    async def prepare(
        self, request: generate_pb2.GenerateRequest, clock: CallClock, dialect: Dialect
    ) -> PreparedRequest:
        """Raises BadRequest, TextUnavailable."""
        limits = self._limits()
        request_id = request.request_id or uuid.uuid4().hex
        check_request_id(request_id)
        self._check_model(request.model)
        check_scheduling(request.priority, request.tenant)
        fields = _request_fields(request.sampling_params)
        resumed = _checked_ids("resume_output_ids", request.resume_output_ids, limits)
        prompt = await self._prompt_ids(request, limits)
        if dialect.clamps_max_tokens and fields.max_tokens is not None:
            room = limits.max_model_len - len(prompt)
            fields = dataclasses.replace(fields, max_tokens=min(fields.max_tokens, room))
        params = resolve_sampling(fields, self._text.defaults, limits, len(prompt), len(resumed))
        common = engine_pb2.Submit(
            request_id=request_id,
            prompt_ids=_packed(prompt),
            resume_output_ids=_packed(resumed),
            sampling_params=_resolved_message(params),
            stop_ids=_packed(np.asarray(params.stop_ids)),
            arrival_time=clock.arrival_time,
            priority=request.priority,
            tenant=request.tenant,
            use_prefix_cache=not request.HasField("use_prefix_cache") or request.use_prefix_cache,
            deadline=clock.deadline,
            bad_words=await self._bad_words(params.bad_words),
        )
        outputs = [
            OutputStream(self._assembler(params, resumed.tolist(), dialect), len(prompt), index)
            for index in range(params.num_samples)
        ]
        return PreparedRequest(
            submits=[
                _sample_submit(common, index, params.sample_seed(index))
                for index in range(len(outputs))
            ],
            started=generate_pb2.Started(
                request_id=request_id, seed=params.seed, prompt_token_count=len(prompt)
            ),
            outputs=outputs,
            wants_logprobs=params.num_logprobs is not None,
            is_complete=outputs[0].matched_stop is not None,
        )

    def _assembler(
        self, params: SamplingParams, resumed: list[int], dialect: Dialect
    ) -> OutputAssembler:
        return OutputAssembler(
            self._text.tokenizer,
            stops=params.stop,
            stop_ids=params.stop_ids,
            min_tokens=params.min_tokens,
            include_stop=params.include_stop,
            skip_special_tokens=dialect.skip_special_tokens,
            resume_output_ids=resumed,
            ids_through_stop=dialect.ids_through_stop,
        )

    async def _bad_words(self, words: Sequence[str]) -> list[bytes]:
        if not words:
            return []
        tokenizer = self._text.require_tokenizer()
        sequences = await self._off_loop(lambda: bad_word_ids(tokenizer, words))
        return [_packed(np.asarray(ids)) for ids in sequences]

    def _limits(self) -> ModelLimits:
        tokenizer = self._text.tokenizer
        return ModelLimits(
            vocab_size=self._availability.vocab_size,
            max_model_len=self._availability.max_model_len,
            longest_token_chars=None if tokenizer is None else tokenizer.longest_token_chars,
        )

    def _check_model(self, model: str) -> None:
        if model not in ("", self._served_model_name):
            raise BadRequest("model", model, f"empty or {self._served_model_name!r}, the one here")

    async def _prompt_ids(self, request: generate_pb2.GenerateRequest, limits: ModelLimits) -> _Ids:
        ids: Sequence[int]
        match request.WhichOneof("prompt"):
            case "token_ids":
                check_prompt_length(len(request.token_ids.ids), limits)
                return _checked_ids("token_ids.ids", request.token_ids.ids, limits)
            case "text":
                tokenizer = self._text.require_tokenizer()
                check_text("text", request.text, limits)
                ids = await self._off_loop(lambda: tokenizer.encode(request.text))
            case "chat":
                ids = await self._chat_ids(request.chat, limits)
            case _:
                raise BadRequest("prompt", "unset", "one of text, chat and token_ids")
        check_prompt_length(len(ids), limits)
        return check_token_ids("prompt", ids, limits)

    async def _chat_ids(self, chat: generate_pb2.ChatPrompt, limits: ModelLimits) -> Sequence[int]:
        tokenizer = self._text.require_tokenizer()
        template = self._text.require_chat_template()
        # An empty message still costs a token of the template.
        num_messages = len(chat.messages)
        if not 1 <= num_messages <= limits.max_model_len:
            limit = f"at least 1 and at most {limits.max_model_len}, the tokens of the context"
            raise BadRequest("chat.messages", num_messages, limit, "number of")
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        num_chars = sum(len(part) for message in messages for part in message.values())
        check_text_length("chat.messages", num_chars, limits)
        return await self._off_loop(lambda: encode_chat(tokenizer, template, messages))

    async def _off_loop(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def check_request_id(request_id: str, field: str = "request_id") -> None:
    """Raises BadRequest."""
    if not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise BadRequest(field, request_id, f"1 to {MAX_REQUEST_ID_CHARS} characters long")


def _checked_ids(field: str, ids: Sequence[int], limits: ModelLimits) -> _Ids:
    """Looks at the number before it looks at each."""
    if len(ids) > limits.max_model_len:
        limit = f"at most {limits.max_model_len}, the tokens of the context"
        raise BadRequest(field, len(ids), limit, "number of")
    return check_token_ids(field, ids, limits)


def _request_fields(params: generate_pb2.SamplingParams) -> RequestFields:
    num_stop_ids = len(params.stop_token_ids)
    if num_stop_ids > MAX_STOP_IDS:
        raise BadRequest("stop_token_ids", num_stop_ids, f"at most {MAX_STOP_IDS}", "number of")
    present: dict[str, Any] = {field.name: value for field, value in params.ListFields()}
    kind = params.WhichOneof("constraint")
    if kind is not None and (value := present.pop(kind)) is not False:  # no `json_object`: as unset
        present["constraint"] = Constraint(kind, value)
    return RequestFields(**present)


def _resolved_message(params: SamplingParams) -> generate_pb2.SamplingParams:
    """Every field set; stop texts stay here, stop ids and bad words travel beside."""
    constraint = params.constraint
    return generate_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        logprobs=params.num_logprobs,
        n=params.num_samples,
        prompt_logprobs=params.num_prompt_logprobs,
        logit_bias=dict(params.logit_bias),
        **({} if constraint is None else {constraint.kind: constraint.value}),
    )


def _sample_submit(common: engine_pb2.Submit, index: int, seed: int) -> engine_pb2.Submit:
    submit = engine_pb2.Submit()
    submit.CopyFrom(common)
    submit.sampling_params.seed = seed
    if index:  # the samples share their prompt, of which the first one tells
        submit.sampling_params.ClearField("prompt_logprobs")
    return submit


def _packed(ids: npt.NDArray[np.integer]) -> bytes:
    return ids.astype("<i4").tobytes()
