"""One row's sampling parameters, and what a step must run to serve a set of rows.

Everything here is decided on the host from parameters, never from values on the device, so all
ranks choose the same variant and a captured graph can stand for it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_STOP_IDS = 16
MAX_ALTERNATIVES = 20
MAX_BIASED_IDS = 300
MAX_BAD_WORDS = 32
MAX_BAD_WORD_IDS = 16
NUM_CANDIDATES = 64
# Below this the quotient logit / temperature could leave float32's range; a row this cold picks
# its best token at any logit gap that half-precision weights can produce.
MIN_TEMPERATURE = 1e-5


class SampleVariant(enum.IntEnum):
    """What a step runs; each serves every row that a smaller one serves, with the same tokens."""

    LOCAL_BEST = 0  # greedy and temperature: one record per row and rank
    TOP_CANDIDATES = 1  # also top_k <= 64 (with top_p, min_p) and alternatives
    THRESHOLD = 2  # also top_p or min_p alone, and large top_k


@dataclass(frozen=True)
class SlotParams:
    """Sampling parameters of the sequence in one slot, checked when made.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. `num_logprobs` is None for no
    logprobs, 0 for the sampled token's only, n for n alternatives as well. `stop_ids` cannot be
    sampled while fewer than `min_tokens` tokens came after the first `prompt_len`. `logit_bias`
    pairs an id with what is added to its logit. The last id of a bad word is not sampled after its
    others; `recent_ids` are the last outputs that there were when the slot was opened. With
    `is_constrained` every token is chosen under a mask.

    Raises:
        ValueError: names the field, its value and the limit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_len: int = 0
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = field(default=())
    num_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    recent_ids: tuple[int, ...] = ()
    is_constrained: bool = False

    def __post_init__(self) -> None:
        # Comparisons are written so that NaN fails them.
        _require(0.0 <= self.temperature < 1e30, "temperature", self.temperature, "at least 0")
        _require(0 <= self.top_k < 1 << 31, "top_k", self.top_k, "0 (off) to 2**31 - 1")
        _require(0.0 <= self.top_p <= 1.0, "top_p", self.top_p, "0 to 1 (off)")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "0 (off) to 1")
        _require(0 <= self.seed < 1 << 64, "seed", self.seed, "0 to 2**64 - 1")
        _require(
            1e-6 <= self.repetition_penalty <= 1e6,
            "repetition_penalty",
            self.repetition_penalty,
            "1e-6 to 1e6",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require(abs(getattr(self, name)) <= 1e6, name, getattr(self, name), "-1e6 to 1e6")
        for name in ("prompt_len", "min_tokens"):
            _require(0 <= getattr(self, name) < 1 << 31, name, getattr(self, name), "0 to 2**31-1")
        _require(
            len(self.stop_ids) <= MAX_STOP_IDS,
            "stop_ids",
            self.stop_ids,
            f"at most {MAX_STOP_IDS} ids",
        )
        _require(
            all(0 <= token_id < 1 << 31 for token_id in self.stop_ids),
            "stop_ids",
            self.stop_ids,
            "ids from 0 to 2**31 - 1",
        )
        _require(
            self.num_logprobs is None or 0 <= self.num_logprobs <= MAX_ALTERNATIVES,
            "num_logprobs",
            self.num_logprobs,
            f"None or 0 to {MAX_ALTERNATIVES}",
        )
        self._check_bias()
        self._check_bad_words()

    def _check_bias(self) -> None:
        ids = [token_id for token_id, _ in self.logit_bias]
        _require(len(ids) <= MAX_BIASED_IDS, "logit_bias", ids, f"at most {MAX_BIASED_IDS} ids")
        _require(len(set(ids)) == len(ids), "logit_bias", ids, "of different ids")
        for token_id, value in self.logit_bias:
            _require(0 <= token_id < 1 << 31, "logit_bias", token_id, "an id from 0 to 2**31 - 1")
            _require(abs(value) <= 1e6, f"logit_bias[{token_id}]", value, "-1e6 to 1e6")

    def _check_bad_words(self) -> None:
        words = self.bad_words
        _require(len(words) <= MAX_BAD_WORDS, "bad_words", len(words), f"at most {MAX_BAD_WORDS}")
        for word in words:
            limit = f"1 to {MAX_BAD_WORD_IDS} ids"
            _require(1 <= len(word) <= MAX_BAD_WORD_IDS, "a bad word", word, limit)
            _require(all(0 <= i < 1 << 31 for i in word), "a bad word", word, "ids below 2**31")
        limit = f"at most {MAX_BAD_WORD_IDS - 1} ids"
        _require(len(self.recent_ids) < MAX_BAD_WORD_IDS, "recent_ids", self.recent_ids, limit)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether the slot's penalty counts are ever read."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def alters_logits(self) -> bool:
        """Whether penalties or a minimum length change the logits before the choice."""
        return self.counts_tokens or (self.min_tokens > 0 and len(self.stop_ids) > 0)

    @property
    def variant(self) -> SampleVariant:
        """The smallest variant that serves this row. Filters never change a greedy choice."""
        if not self.is_greedy:
            if self.top_k > NUM_CANDIDATES:
                return SampleVariant.THRESHOLD
            if self.top_k > 0:
                return SampleVariant.TOP_CANDIDATES
            if self.top_p < 1.0 or self.min_p > 0.0:
                return SampleVariant.THRESHOLD
        wants_alternatives = self.num_logprobs is not None and self.num_logprobs > 0
        return SampleVariant.TOP_CANDIDATES if wants_alternatives else SampleVariant.LOCAL_BEST


def _require(holds: bool, name: str, value: object, limit: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, must be {limit}")


@dataclass(frozen=True)
class SamplePlan:
    """Which work a step's rows need, as the host knows.

    `all_greedy`, `with_top_k` and `with_top_p` only leave out work that would change nothing, so
    their defaults say "may be needed".
    """

    variant: SampleVariant = SampleVariant.LOCAL_BEST
    with_penalties: bool = False
    with_logprobs: bool = False
    all_greedy: bool = False
    with_top_k: bool = True
    with_top_p: bool = True
    with_bias: bool = False
    with_bad_words: bool = False
    with_mask: bool = False

    @property
    def reads_logits_once(self) -> bool:
        """One kernel reads the logits as the model leaves them, and nothing alters them."""
        alters = self.with_penalties or self.with_bias or self.with_bad_words or self.with_mask
        is_best_alone = self.variant is SampleVariant.LOCAL_BEST and not self.with_logprobs
        return is_best_alone and not alters


def plan_sample(rows: Iterable[SlotParams]) -> SamplePlan:
    """The plan that serves all `rows` (the sequences of one step) at least cost."""
    rows = list(rows)
    sampled = [row for row in rows if not row.is_greedy]
    return SamplePlan(
        variant=max((row.variant for row in rows), default=SampleVariant.LOCAL_BEST),
        with_penalties=any(row.alters_logits for row in rows),
        with_logprobs=any(row.num_logprobs is not None for row in rows),
        all_greedy=not sampled,
        with_top_k=any(row.top_k > 0 for row in sampled),
        with_top_p=any(row.top_p < 1.0 for row in sampled),
        with_bias=any(row.logit_bias for row in rows),
        with_bad_words=any(row.bad_words for row in rows),
        with_mask=any(row.is_constrained for row in rows),
    )
