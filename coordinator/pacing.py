"""How much work to keep in front of the ranks, and in grants of what size.

Sending a command and hearing of it takes a round trip, during which the ranks must not run dry;
what arrives meanwhile waits for everything outstanding. So about four milliseconds are kept
outstanding, and never less than two steps: with steps of 0.6 ms two commands of three steps, with
steps above 4 ms one step that runs and one behind it.
"""

from coordinator.outstanding import Outstanding

_AHEAD_S = 0.004
_MIN_STEPS_AHEAD = 2
_MAX_STEPS_AHEAD = 16
_MAX_GRANT = 8
_NEWEST_WEIGHT = 0.1  # of the newest step in the moving averages


class Pacing:
    """Moving averages of step times, apart for steps of rows alone and steps with chunks."""

    def __init__(self) -> None:
        self.decode_step_s = _AHEAD_S
        self.mixed_step_s = _AHEAD_S

    def observe(self, step_micros: int, is_mixed: bool) -> None:
        """A step took that long on the device."""
        step_s = max(step_micros, 1) / 1e6
        if is_mixed:
            self.mixed_step_s += _NEWEST_WEIGHT * (step_s - self.mixed_step_s)
        else:
            self.decode_step_s += _NEWEST_WEIGHT * (step_s - self.decode_step_s)

    @property
    def steps_per_grant(self) -> int:
        """Decode steps of one command, so that two commands are outstanding."""
        return min(max(1, int(_AHEAD_S / 2 / self.decode_step_s)), _MAX_GRANT)

    def wants_more(self, outstanding: Outstanding, num_steps: int) -> bool:
        """A command of `num_steps` decode steps is to be sent now."""
        num_decode, num_mixed = outstanding.num_decode_steps, outstanding.num_mixed_steps
        if num_decode + num_mixed < _MIN_STEPS_AHEAD:
            return True
        planned_s = (num_decode + num_steps) * self.decode_step_s + num_mixed * self.mixed_step_s
        return planned_s <= _AHEAD_S and num_decode + num_mixed + num_steps <= _MAX_STEPS_AHEAD
