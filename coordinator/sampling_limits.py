"""What sampling parameters may be: the limits of the public API, for frontends and engine alike."""

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.errors import BadRequest

MAX_STOP_IDS = 16
"""Rows of the device table of stop ids, end-of-sequence ids included."""
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_LOGPROBS = 20
"""Alternatives that a result of the ranks has to each token."""
MAX_SAMPLES = 16
MAX_PRIORITY = 100
"""Of either sign; that it is bounded keeps everyone from starving."""
MAX_TENANT_CHARS = 64
MAX_BIASED_IDS = 300
MAX_BAD_WORDS = 16
MAX_BAD_WORD_CHARS = 64
MAX_BAD_WORD_SEQUENCES = 2 * MAX_BAD_WORDS
"""Rows of the device table of bad words: each word alone and after a space."""
MAX_BAD_WORD_IDS = 16
"""Columns of that table."""
MAX_CONSTRAINT_BYTES = 65536
MAX_CHOICES = 256
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """Numbers from `low` (itself excluded if `is_open`) to `high`; never NaN."""

    low: float
    high: float
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        # Written so that NaN fails both comparisons.
        is_above = value > self.low if self.is_open else value >= self.low
        return is_above and value <= self.high

    def check(self, field: str, value: float) -> None:
        """Raises BadRequest if `value` is outside."""
        if value not in self:
            raise BadRequest(field, value, f"{self}")

    def __str__(self) -> str:
        least = f"above {self.low:.12g}" if self.is_open else f"at least {self.low:.12g}"
        return f"{least} and at most {self.high:.12g}"


SAMPLING_RANGES: Mapping[str, Range] = {
    # 0 is greedy. Above 100 every vocabulary is flat already.
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, is_open=True),
    "top_k": Range(0, MAX_INT32),
    "min_p": Range(0, 1),
    # The low end keeps logits / penalty finite in float32.
    "repetition_penalty": Range(1e-6, 100),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
}
BIAS_RANGE = Range(-100, 100)
