"""What a replay found, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coordinator.replay_comparison import Comparison, StepTime
from coordinator.step_log_reader import RecordedRun
from lockstep.daemon.exit_codes import ExitCode

DIFFERENT_TOKENS = 1
_SLOWEST_HEADER = (
    *("command", "step", "rows", "chunks", "prefill tokens", "recorded ms", "replayed ms"),
)


@dataclass(frozen=True)
class LostRank:
    """Where a replay stopped, by the log's numbers. Command 0: while the snapshot was rebuilt or
    before."""

    rank: int
    command_id: int
    step: int
    problem: str

    def __str__(self) -> str:
        if not self.command_id:
            return f"rank {self.rank}, before the log's first command: {self.problem}"
        return f"rank {self.rank} at command {self.command_id}, step {self.step}: {self.problem}"


@dataclass(frozen=True)
class ReplayReport:
    """The outcome of one replay."""

    log: RecordedRun
    comparison: Comparison
    lost: LostRank | None

    @property
    def exit_code(self) -> int:
        if self.lost is not None:
            return ExitCode.GROUP_LOST
        return DIFFERENT_TOKENS if self.comparison.num_different else ExitCode.CLEAN

    def text(self) -> str:
        """Several lines."""
        comparison, header = self.comparison, self.log.header
        first = f"{self.log.snapshot.command_id + 1}"
        rows = [
            ("log", ", ".join(str(segment.path) for segment in self.log.segments)),
            ("recorded by", f"lockstep {header.package_version}, epoch {header.epoch}"),
            ("commands", f"{first} to {self.log.last_command}"),
            ("its end", _cause(self.log.cause)),
            *(("note", note) for note in self.log.notes),
            ("steps replayed", str(comparison.num_replayed)),
            ("steps compared", str(comparison.num_compared)),
            ("different tokens", str(comparison.num_different)),
            ("first difference", str(comparison.first or "none")),
            ("stopped at", str(self.lost or "the end")),
            *self._times(),
        ]
        lines = [f"{name:<17} {value}" for name, value in rows]
        if comparison.slowest:
            lines += ["", "slowest steps:", *_slowest(comparison.slowest)]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same as plain data; times in microseconds."""
        comparison, header = self.comparison, self.log.header
        return {
            "log": [str(segment.path) for segment in self.log.segments],
            "package_version": header.package_version,
            "epoch": header.epoch,
            "first_command": self.log.snapshot.command_id + 1,
            "last_command": self.log.last_command,
            "recorded_cause": self.log.cause,
            "notes": list(self.log.notes),
            "steps_replayed": comparison.num_replayed,
            "steps_compared": comparison.num_compared,
            "different_tokens": comparison.num_different,
            "first_difference": asdict(comparison.first) if comparison.first else None,
            "lost": asdict(self.lost) if self.lost else None,
            "step_micros": self._percentiles(),
            "slowest": [step._asdict() for step in comparison.slowest],
            "exit_code": int(self.exit_code),
        }

    def _percentiles(self) -> dict[str, dict[str, float]]:
        micros = self.comparison.micros()
        if not len(micros):
            return {}
        values = np.percentile(micros, [50, 99], axis=0)
        return {
            name: {"p50": float(values[0, column]), "p99": float(values[1, column])}
            for column, name in enumerate(("recorded", "replayed"))
        }

    def _times(self) -> list[tuple[str, str]]:
        return [
            (f"step ms {name}", f"p50 {_ms(values['p50'])}, p99 {_ms(values['p99'])}")
            for name, values in self._percentiles().items()
        ]


def _cause(cause: str | None) -> str:
    if cause is None:
        return "not in the log"
    return cause or "the coordinator stopped"


def _slowest(steps: Sequence[StepTime]) -> list[str]:
    rows = [
        (
            *(step.command_id, step.step, step.num_rows, step.num_chunks, step.num_prefill_tokens),
            *(_ms(step.recorded), _ms(step.replayed)),
        )
        for step in steps
    ]
    cells = [_SLOWEST_HEADER, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_SLOWEST_HEADER))]
    return [
        " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]


def _ms(micros: float) -> str:
    return f"{micros / 1000:.2f}"
