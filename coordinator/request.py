"""The record of a request. Everything in a worker but the weights is a cache of these."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coordinator.prefix_keys import PrefixKeys
from protos.lockstep.v1 import generate_pb2, worker_pb2


class RequestState(enum.Enum):
    """Where a request stands; see `_LEGAL` for the ways between."""

    WAITING = "waiting"  # in the queue, no slot
    PREFILLING = "prefilling"  # has a slot; chunks of its tokens are being sent
    RUNNING = "running"  # a row of the decode batch
    COMPLETING = "completing"  # every position is granted, slot closed, last results on their way
    PREEMPTED = "preempted"  # lost its slot, waits in front of the queue; results may still come
    FINISHED = "finished"  # ended; whatever still comes is dropped


_LEGAL = {
    RequestState.WAITING: {RequestState.PREFILLING, RequestState.FINISHED},
    RequestState.PREFILLING: {
        RequestState.RUNNING,
        RequestState.PREEMPTED,
        RequestState.FINISHED,
    },
    RequestState.RUNNING: {
        RequestState.COMPLETING,
        RequestState.PREEMPTED,
        RequestState.FINISHED,
    },
    RequestState.COMPLETING: {RequestState.FINISHED},
    RequestState.PREEMPTED: {RequestState.PREFILLING, RequestState.FINISHED},
    RequestState.FINISHED: set(),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens of a request are chosen, every value resolved; meanings as in worker.proto."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_tokens: int
    stop_ids: tuple[int, ...]
    num_logprobs: int  # -1: none wanted
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    num_prompt_logprobs: int = -1  # -1: none wanted

    @property
    def counts_tokens(self) -> bool:
        """Its penalties depend on which tokens the sequence holds."""
        is_plain = self.repetition_penalty == 1.0
        return not is_plain or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(eq=False, slots=True)
class Request:
    """One request from Submit to its end.

    `order` is its precedence, unique among requests in flight: of two that hold slots the larger
    gives up its place first (see precedence.py). Times are of CLOCK_MONOTONIC, in seconds.
    """

    order: int
    frontend: int
    handle: int
    request_id: str
    prompt_ids: npt.NDArray[np.int32]
    max_tokens: int
    sampling: Sampling
    arrival_time: float
    output_ids: list[int] = field(default_factory=list)  # resumed ones included
    tenant: str = ""
    use_prefix_cache: bool = True
    leader: Request | None = None  # sample 0 of the same call, if this is another sample
    group: int = 0  # handle of sample 0 of its call
    deadline: float = 0.0  # 0: none
    num_resumed: int = 0  # output tokens of an earlier call
    state: RequestState = RequestState.WAITING
    slot: int = 0  # 0: none
    row: int = -1  # -1: none
    block_ids: list[int] = field(default_factory=list)
    limit: int = 0  # as last sent
    prefill_len: int = 0
    cached_len: int = 0  # tokens that were in its blocks when it got its slot
    num_prefilled: int = 0  # tokens that are cached or whose chunks are sent
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when it first got a slot
    prefix_keys: PrefixKeys | None = None  # None: shares no blocks
    ready_after_step: int = 0  # preempted: last step that may still report a token
    num_charged: int = 0  # output tokens that its tenant was charged for
    num_partial_chunks: int = 0  # that did not end what was to prefill
    num_preemptions: int = 0
    first_chunk_time: float = 0.0  # 0: none sent yet
    sums_at_first_chunk: tuple[int, int] = (0, 0)  # see TimeKeeper
    first_token_time: float = 0.0  # 0: no token yet
    last_token_time: float = 0.0
    constraint: generate_pb2.SamplingParams | None = None  # what its grammar process is told
    constraint_key: int = 0
    next_mask: worker_pb2.SlotMask | None = None  # of its next token; None until it is made
    sent_mask: worker_pb2.SlotMask | None = None  # of the last token that was granted
    num_scored: int = 1  # prompt tokens of which no log-probability is to come any more
    num_masked: int = 0  # tokens that may be computed: those to prefill and one a mask since

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_steps(self) -> int:
        """That it took part in: each gives a token or computes a chunk that ends no prompt."""
        return len(self.output_ids) - self.num_resumed + self.num_partial_chunks

    @property
    def num_to_prefill(self) -> int:
        """Tokens to compute before it can go on; late results still add to it."""
        return self.prompt_len + len(self.output_ids)

    @property
    def final_limit(self) -> int:
        """First position that never needs computing: the last output token is only sampled."""
        return self.prompt_len + self.max_tokens - 1

    @property
    def awaits_prompt_scores(self) -> bool:
        """Log-probabilities of its prompt are wanted and have not all come."""
        return self.sampling.num_prompt_logprobs >= 0 and self.num_scored < self.prompt_len

    @property
    def top_limit(self) -> int:
        """What its limit may rise to now, given the blocks."""
        if self.constraint is None:
            return self.final_limit
        return min(self.final_limit, self.num_masked)

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    def open_slot(self, slot: int, cached_len: int = 0) -> None:
        """Waiting or preempted -> prefilling: takes a slot; outputs so far are prefilled too.

        The first `cached_len` tokens are in blocks that it takes over.
        """
        if self.state is RequestState.WAITING:
            self.num_cached_tokens = min(cached_len, self.prompt_len)
        self._enter(RequestState.PREFILLING)
        self.slot = slot
        self.prefill_len = self.num_to_prefill
        self.cached_len = self.num_prefilled = cached_len
        self.num_masked = self.prefill_len  # whose last chunk brings the mask of the next token
        self.sent_mask = None
        self.limit = 0

    def start_decoding(self, row: int) -> None:
        """Prefilling -> running: its final chunk is sent."""
        assert self.num_prefilled == self.prefill_len
        self._enter(RequestState.RUNNING)
        self.row = row

    def complete(self) -> None:
        """Running -> completing: every position is granted."""
        self._enter(RequestState.COMPLETING)
        self._forget_place()

    def preempt(self, last_sent_step: int) -> None:
        """Prefilling or running -> preempted. Tokens up to `last_sent_step` still count."""
        self._enter(RequestState.PREEMPTED)
        self._forget_place()
        self.ready_after_step = last_sent_step
        self.num_preemptions += 1

    def finish(self) -> None:
        """Any state but finished -> finished."""
        self._enter(RequestState.FINISHED)
        self._forget_place()

    def take_mask(self) -> worker_pb2.SlotMask:
        """Its next mask, which is sent now, for its slot."""
        assert self.next_mask is not None
        mask, self.next_mask = self.next_mask, None
        mask.slot = self.slot
        self.sent_mask = mask
        return mask

    def tokens_from(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Token ids of positions start..start+length-1, int32."""
        end = start + length
        prompt = self.prompt_ids[start:end]
        if end <= self.prompt_len:
            return prompt
        first_output = max(start - self.prompt_len, 0)
        output = np.array(self.output_ids[first_output : end - self.prompt_len], dtype=np.int32)
        return np.concatenate([prompt, output])

    def _enter(self, state: RequestState) -> None:
        assert state in _LEGAL[self.state], f"request {self.request_id}: {self.state} -> {state}"
        self.state = state

    def _forget_place(self) -> None:
        assert not self.block_ids, "blocks must be released first"
        self.slot = 0
        self.row = -1
