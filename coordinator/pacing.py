"""How much work to keep in front of the ranks, and in grants of what size.

Sending a command and hearing of it takes a round trip, during which the ranks must not run dry;
what arrives meanwhile waits for everything outstanding. So about four milliseconds are kept
outstanding, and never less than two commands, since all results of one may come together: with
steps of 0.6 ms two commands of three steps. A decode step of more than 4 ms has none behind it
until 4 ms of it are left. Where the ranks run dry all the same, because this host is slow or busy,
it becomes more, up to 24 milliseconds: larger grants up to six milliseconds, and then more of them,
since all that a grant takes passes before this host hears of it. A constrained row has one token
for all that is ahead, as its next mask needs the token: beside one it is twelve milliseconds at
most.
"""

from coordinator.outstanding import Outstanding

_AHEAD_S = 0.004
_MAX_AHEAD_S = 0.024
_MAX_AHEAD_OF_MASKS_S = 0.012
_MAX_GRANT_S = 0.006
_MAX_IDLE_SHARE = 0.005  # of the ranks' time
_IDLE_WEIGHT = 0.02  # of the newest step in the share
_MORE, _LESS = 1.02, 0.9995  # factors a step
_ROUNDING = 0.05  # of a step: three steps of 2.01 ms are six milliseconds
_MIN_COMMANDS_AHEAD = 2
_DEVIATIONS = 3.0  # mean absolute ones: 2.4 standard deviations of a normal distribution
_TIMER_S = 0.001  # to which the event loop's timers are exact
_MAX_STEPS_AHEAD = 16
_MAX_GRANT = 8
_NEWEST_WEIGHT = 0.1  # of the newest step in the moving averages


class Pacing:
    """Moving averages of step times, apart for steps of rows alone and steps with chunks."""

    def __init__(self) -> None:
        self.ahead_s = _AHEAD_S
        self.decode_step_s = _AHEAD_S
        self.mixed_step_s = _AHEAD_S
        self._deviation_s = 0.0  # of decode steps from their average, its absolute value
        self._idle_share = 0.0
        self._idle_micros: int | None = None  # rank 0's count when it last had work behind it

    def planned(self, has_work: bool) -> None:
        """Planning is over; without work outstanding the ranks rightly wait."""
        if not has_work:
            self._idle_micros = None

    def observe(self, step_micros: int, idle_micros: int, is_mixed: bool) -> None:
        """A step took that long on rank 0, which has waited `idle_micros` in all."""
        if self._idle_micros is not None:
            self._react(idle_micros - self._idle_micros, step_micros)
        self._idle_micros = idle_micros
        step_s = max(step_micros, 1) / 1e6
        if is_mixed:
            self.mixed_step_s += _NEWEST_WEIGHT * (step_s - self.mixed_step_s)
        else:
            error_s = step_s - self.decode_step_s
            self.decode_step_s += _NEWEST_WEIGHT * error_s
            self._deviation_s += _NEWEST_WEIGHT * (abs(error_s) - self._deviation_s)

    def _react(self, waited_micros: int, step_micros: int) -> None:
        share = waited_micros / max(waited_micros + step_micros, 1)
        self._idle_share += _IDLE_WEIGHT * (share - self._idle_share)
        factor = _MORE if self._idle_share > _MAX_IDLE_SHARE else _LESS
        self.ahead_s = min(max(self.ahead_s * factor, _AHEAD_S), _MAX_AHEAD_S)

    @property
    def steps_per_grant(self) -> int:
        """Decode steps of one command, so that two commands or more are outstanding."""
        grant_s = min(self.ahead_s / 2, _MAX_GRANT_S)
        num_steps = int(grant_s / self.decode_step_s + _ROUNDING)
        return min(max(1, num_steps), _MAX_GRANT)

    def too_early_s(
        self, outstanding: Outstanding, elapsed_s: float, has_constrained: bool = False
    ) -> float:
        """Seconds for which the running command is enough by itself; 0 without one.

        `elapsed_s` is for how long its next step has been running, which may end earlier than the
        average by what steps deviate from it. Only decode steps: how long one with chunks takes is
        not known well enough.
        """
        if len(outstanding) != 1 or outstanding.num_mixed_steps:
            return 0.0
        left_s = outstanding.num_decode_steps * self.decode_step_s - elapsed_s
        early_s = left_s - _DEVIATIONS * self._deviation_s - self._ahead_s(has_constrained)
        return early_s if early_s >= _TIMER_S else 0.0

    def wants_more(
        self, outstanding: Outstanding, num_steps: int, has_constrained: bool = False
    ) -> bool:
        """A command of `num_steps` decode steps is to be sent now."""
        num_decode, num_mixed = outstanding.num_decode_steps, outstanding.num_mixed_steps
        if len(outstanding) < _MIN_COMMANDS_AHEAD:
            return True
        planned_s = (num_decode + num_steps - _ROUNDING) * self.decode_step_s
        planned_s += num_mixed * self.mixed_step_s
        is_within = planned_s <= self._ahead_s(has_constrained)
        return is_within and num_decode + num_mixed + num_steps <= _MAX_STEPS_AHEAD

    def _ahead_s(self, has_constrained: bool) -> float:
        return min(self.ahead_s, _MAX_AHEAD_OF_MASKS_S) if has_constrained else self.ahead_s
