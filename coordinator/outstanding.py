"""What has been granted and not yet reported; results are resolved against it and nothing else."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.errors import ProtocolBroken
from coordinator.request import Request


@dataclass(frozen=True)
class SentCommand:
    """What a command granted, kept until its results have come.

    `entries` are the requests of the first step's results in their order: rows, then final chunks;
    further steps have the rows alone. `scored` are (request, first position, number) of the prompt
    positions behind which the first step gives log-probabilities.
    """

    command_id: int
    first_step: int
    num_steps: int
    rows: Sequence[Request]
    final_chunks: Sequence[Request]
    has_chunks: bool = False
    scored: Sequence[tuple[Request, int, int]] = ()

    @property
    def last_step(self) -> int:
        """Of a heartbeat: the step before it."""
        return self.first_step + self.num_steps - 1

    def is_mixed(self, step: int) -> bool:
        """Prompt chunks run in `step`."""
        return self.has_chunks and step == self.first_step

    def entries(self, step: int) -> Sequence[Request]:
        """The requests that have an entry in the result of `step`, in order."""
        return [*self.rows, *self.final_chunks] if step == self.first_step else self.rows


class Outstanding:
    """The commands of one epoch whose results have not all come, oldest first."""

    def __init__(self) -> None:
        self.last_reported_step = 0
        self._sent: deque[SentCommand] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def num_decode_steps(self) -> int:
        """Unreported steps that run rows alone."""
        if not self._sent:
            return 0
        return self._sent[-1].last_step - self.last_reported_step - self.num_mixed_steps

    @property
    def num_mixed_steps(self) -> int:
        """Unreported steps with prompt chunks."""
        reported = self.last_reported_step
        return sum(sent.has_chunks and sent.first_step > reported for sent in self._sent)

    @property
    def is_mixed_step_next(self) -> bool:
        """The next result to come is of a step with prompt chunks."""
        return bool(self._sent) and self._sent[0].is_mixed(self.last_reported_step + 1)

    @property
    def next_scored(self) -> Sequence[tuple[Request, int, int]]:
        """`SentCommand.scored` of the next step to be reported."""
        is_first = bool(self._sent) and self._sent[0].first_step == self.last_reported_step + 1
        return self._sent[0].scored if is_first else ()

    def add(self, sent: SentCommand) -> None:
        """A command with steps goes out."""
        self._sent.append(sent)

    def resolve(self, command_id: int, step: int) -> Sequence[Request]:
        """The requests that a result speaks of, in the order of its entries.

        Results come once each and in order; ProtocolBroken otherwise.
        """
        expected = self.last_reported_step + 1
        if not self._sent or self._sent[0].command_id != command_id or step != expected:
            awaited = self._sent[0].command_id if self._sent else "none"
            raise ProtocolBroken(
                f"result of command {command_id} step {step}; awaited: command {awaited} "
                f"step {expected}"
            )
        sent = self._sent[0]
        self.last_reported_step = step
        if step == sent.last_step:
            self._sent.popleft()
        return sent.entries(step)
