"""How long a new request would wait for its first token, from what the last steps have shown."""

import math
from dataclasses import dataclass

_STEP_WEIGHT = 0.02  # of the newest step with prompts: about the last 50 count
_DECODE_WEIGHT = 0.01  # of the steps without prompts, among those with
_STAY_WEIGHT = 0.05  # of the newest request that gave up its slot
_ADMISSION_WEIGHT = 0.05  # of the newest request that got one


@dataclass(frozen=True)
class Load:
    """What holds slots and KV blocks now, and what is to be admitted before a request."""

    num_requests_ahead: float = 0.0
    num_tokens_ahead: float = 0.0  # of them, and of prompts that are partly prefilled
    num_tokens_sent: int = 0  # in chunks that the ranks have not reported yet
    num_running: int = 0
    num_free_slots: int = 1
    # Of the request whose slot this one gets if they end in the order in which they began.
    slot_age_s: float = 0.0  # since its first chunk
    slot_age_steps: float = math.inf  # that it took part in; inf: no slot is awaited
    num_used_positions: int = 0  # in the KV cache
    num_free_positions: int = 1 << 62


class Predictor:
    """Learns from steps and from requests that give up their slots; predicts seconds.

    Prompts: the time of a step that holds x prompt tokens is fitted as a + b * x over the last
    steps with prompts, exponentially weighted. So a prompt's share of a step that mostly decodes is
    not taken for all that the ranks can do, and long chunks are foreseen from short ones. Steps
    without prompts count a little as x = 0, which tells b where all prompts are alike.

    Slots and blocks: a request that holds a slot stays `s` seconds on average, so of `n` running
    one ends every s / n seconds (Little's law), and what is in use comes free within s. That is so
    while slots are taken one by one; after a rush nobody ends until the first has taken its steps:
    the average number less the deviation, at the pace it has had so far.

    Prompts that wait are taken to be found in the prefix cache to the share that the last admitted
    ones were, weighted by their tokens.

    Optimistic where it knows nothing: without steps, or without requests that ended, that part is
    0. A prediction never falls when more is ahead. Pure: reads no clock. Owned by the event loop.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._num_steps = 0
        # Weighted means of x, y, x * x and x * y.
        self._x = self._y = self._xx = self._xy = 0.0
        self._decode_s: float | None = None
        self._stay_s: float | None = None
        # Weighted means of the steps of a stay and of their squares.
        self._stay_steps = self._squared_steps = 0.0
        # Weighted means of the tokens of an admitted request, and of those that had to be computed.
        self._admitted = self._computed = 0.0

    def observe_step(self, num_prompt_tokens: int, seconds: float) -> None:
        """A step took that long."""
        if not num_prompt_tokens:
            if self._decode_s is None:
                self._decode_s = seconds
            self._decode_s += _STEP_WEIGHT * (seconds - self._decode_s)
            return
        self._num_steps += 1
        # The first observations are averaged plainly: none of them starts with a head start.
        weight = max(_STEP_WEIGHT, 1.0 / self._num_steps)
        x, y = float(num_prompt_tokens), seconds
        self._x += weight * (x - self._x)
        self._y += weight * (y - self._y)
        self._xx += weight * (x * x - self._xx)
        self._xy += weight * (x * y - self._xy)

    def observe_admission(self, num_tokens: int, num_cached: int) -> None:
        """A request got its first slot; of its tokens so many were in the prefix cache."""
        self._admitted += _ADMISSION_WEIGHT * (num_tokens - self._admitted)
        self._computed += _ADMISSION_WEIGHT * (num_tokens - num_cached - self._computed)

    def observe_stay(self, seconds: float, num_steps: int) -> None:
        """A request gave up its slot for good that long after it got one, having run so often."""
        weight = _STAY_WEIGHT
        if self._stay_s is None:
            self._stay_s, weight = seconds, 1.0
        self._stay_s += weight * (seconds - self._stay_s)
        self._stay_steps += weight * (num_steps - self._stay_steps)
        self._squared_steps += weight * (num_steps * num_steps - self._squared_steps)

    def time_to_first_token(self, num_own_tokens: int, load: Load) -> float:
        """Seconds until a request with a prompt of that length would get its first token."""
        lacking_slots = load.num_requests_ahead + 1 - load.num_free_slots
        # The last position is computed whatever the cache holds.
        num_own = max(num_own_tokens * self._computed_share, 1.0)
        num_tokens = load.num_tokens_ahead * self._computed_share + num_own
        wait_s = max(
            self._release_s(lacking_slots, load.num_running),
            self._left_s(load),
            self._release_s(num_tokens - load.num_free_positions, load.num_used_positions),
        )
        # Prompts ahead are prefilled while this one waits for its slot; a step that was sent takes
        # no more, and since nobody knows how much of it is left all of it counts.
        return max(
            wait_s + self._prefill_s(num_own, load.num_running),
            self._prefill_s(load.num_tokens_sent, load.num_running)
            + self._prefill_s(num_tokens, load.num_running),
        )

    def time_to_drain(self, num_requests: int, num_tokens: int, load: Load) -> float:
        """Seconds until that much has left the queue."""
        return max(
            self._release_s(num_requests - load.num_free_slots, load.num_running),
            self._prefill_s(num_tokens * self._computed_share, load.num_running),
        )

    @property
    def _computed_share(self) -> float:
        """Of the tokens of a prompt; 1 until something was admitted."""
        return self._computed / self._admitted if self._admitted else 1.0

    def _release_s(self, num_lacking: float, num_in_use: int) -> float:
        """Time until so many of those in use are free."""
        if num_lacking <= 0 or num_in_use <= 0 or self._stay_s is None:
            return 0.0
        return self._stay_s * num_lacking / num_in_use

    def _left_s(self, load: Load) -> float:
        """Time until the request ends whose slot is awaited, if its stay is a short one."""
        if self._stay_s is None:
            return 0.0
        variance = self._squared_steps - self._stay_steps * self._stay_steps
        num_left = self._stay_steps - math.sqrt(max(variance, 0.0)) - load.slot_age_steps
        if num_left <= 0:
            return 0.0
        if load.slot_age_steps > 0:
            return num_left * load.slot_age_s / load.slot_age_steps
        return num_left * self._stay_s / self._stay_steps

    def _prefill_s(self, num_tokens: float, num_rows: int) -> float:
        """Time of the steps that prefill so many tokens beside `num_rows` that decode."""
        if num_tokens <= 0 or not self._num_steps:
            return 0.0
        step_s, token_s = self._fit()
        num_steps = max(num_tokens / max(self._max_batch_tokens - num_rows, 1), 1.0)
        return num_steps * step_s + num_tokens * token_s

    def _fit(self) -> tuple[float, float]:
        """a and b of a + b * x, neither negative."""
        decode_share = 0.0 if self._decode_s is None else _DECODE_WEIGHT
        mixed_share = 1.0 - decode_share
        x, xx, xy = (mixed_share * mean for mean in (self._x, self._xx, self._xy))
        y = mixed_share * self._y + decode_share * (self._decode_s or 0.0)
        variance = xx - x * x
        if variance <= 1e-6 * xx:  # all alike: no slope can be told
            return y, 0.0
        slope = min(max((xy - x * y) / variance, 0.0), y / x)
        return y - slope * x, slope
