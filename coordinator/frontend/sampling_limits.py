"""What sampling parameters may be: the limits of the public API, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.errors import BadRequest

MAX_STOP_IDS = 16
"""Rows of the device table of stop ids, end-of-sequence ids included."""
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_LOGPROBS = 20
MAX_SAMPLES = 16
MAX_PRIORITY = 100
"""Of either sign."""
MAX_TENANT_CHARS = 64
MAX_BIASED_IDS = 300
MAX_BAD_WORDS = 16
MAX_BAD_WORD_CHARS = 64
MAX_BAD_WORD_IDS = 16
"""Columns of the device table of bad words."""
MAX_CONSTRAINT_BYTES = 65536
MAX_CHOICES = 256
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """Numbers from `low` (itself excluded if `is_open`) to `high`; never NaN."""

    low: float
    high: float
    is_open: bool = False

    def check(self, field: str, value: float) -> None:
        """Raises BadRequest if `value` is outside."""
        # Written so that NaN fails both comparisons.
        is_above = value > self.low if self.is_open else value >= self.low
        if not (is_above and value <= self.high):
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
    "logit_bias": Range(-100, 100),
    "frequency_penalty": Range(-2, 2),
}
