"""The coordinator's errors.

CoordinatorError
├── BadRequest        the request is at fault        INVALID_ARGUMENT
├── TextUnavailable   the checkpoint has no text     FAILED_PRECONDITION
├── BadCheckpoint     a checkpoint file is at fault  the daemon stops at start
├── BadStepLog        a step log cannot be replayed  the replay stops at start
├── StartRefused      the daemon stops at start with its exit code
├── RankLost          a rank failed, stalled or left: the group starts again
├── ProtocolBroken    a rank answered what it was not asked; the engine makes a RankLost of it
└── FrontendLost      a frontend process ended by itself: the daemon stops
"""

from pathlib import Path

from lockstep.daemon.exit_codes import ExitCode

_LONGEST_SHOWN_VALUE = 80


class CoordinatorError(Exception):
    """Base of every error the coordinator raises on purpose."""


class BadRequest(CoordinatorError):
    """A field of a request has a value outside its limit.

    `limit` says what is allowed, worded so that "must be ..." can be read before it; `aspect` which
    thing about the field `value` is, worded to be read before its name ("number of").
    """

    def __init__(self, field: str, value: object, limit: str, aspect: str = "") -> None:
        self.field = field
        self.value = value
        self.limit = limit
        self.aspect = aspect
        subject = f"{aspect} {field}" if aspect else field
        super().__init__(f"{subject} is {_shown(value)}; it must be {limit}")


class TextUnavailable(CoordinatorError):
    """Text was asked of a checkpoint that lacks the files for it."""


class BadCheckpoint(CoordinatorError):
    """A file of the checkpoint cannot be used as it is."""

    def __init__(self, file: Path, problem: str) -> None:
        self.file = file
        self.problem = problem
        super().__init__(f"{file}: {problem}")


class BadStepLog(CoordinatorError):
    """A step log cannot be replayed, or not so far."""

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(f"{file}: {problem}")


class StartRefused(CoordinatorError):
    """The daemon cannot start; the message says what and how to mend it."""

    def __init__(self, exit_code: ExitCode, message: str) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class ProtocolBroken(CoordinatorError):
    """A rank sent a report that does not belong to what it was sent."""


class RankLost(CoordinatorError):
    """A rank failed, stalled or left; `rank` is the one that showed it, not always the root."""

    def __init__(self, rank: int, step: int, problem: str) -> None:
        self.rank = rank
        self.step = step
        self.problem = problem
        super().__init__(f"rank {rank} lost at step {step}: {problem}")


class FrontendLost(CoordinatorError):
    """A frontend process ended though nobody told it to."""

    def __init__(self, index: int, return_code: int) -> None:
        self.return_code = return_code
        super().__init__(f"frontend {index} ended with exit code {return_code}")


def _shown(value: object) -> str:
    if isinstance(value, str | bytes) and len(value) > _LONGEST_SHOWN_VALUE:
        return f"{value[:_LONGEST_SHOWN_VALUE]!r}... ({len(value)} long)"
    text = repr(value)
    if len(text) > _LONGEST_SHOWN_VALUE:
        return f"{text[:_LONGEST_SHOWN_VALUE]}..."
    return text
