"""Reads a step log: which segments belong together, what is missing, and the records in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from coordinator.errors import BadStepLog
from coordinator.step_log import FORMAT_VERSION
from coordinator.step_log_files import find_segments, segment_number
from protos.lockstep.v1 import step_log_pb2, worker_pb2


@dataclass(frozen=True)
class Segment:
    """One file. `last_command` is the one before it if it holds none."""

    path: Path
    header: step_log_pb2.StepLogHeader
    snapshot: step_log_pb2.StepLogSnapshot
    last_command: int
    gap: step_log_pb2.StepLogGap | None
    end: step_log_pb2.StepLogEnd | None
    is_truncated: bool


@dataclass(frozen=True)
class RecordedRun:
    """Consecutive segments of one epoch; a replay starts at the first one's snapshot.

    Records of commands after `last_command` are not given; `notes` say what a reader should know.
    """

    segments: Sequence[Segment]
    last_command: int
    notes: Sequence[str]

    @property
    def header(self) -> step_log_pb2.StepLogHeader:
        return self.segments[0].header

    @property
    def snapshot(self) -> step_log_pb2.StepLogSnapshot:
        return self.segments[0].snapshot

    @property
    def cause(self) -> str | None:
        """Why the epoch ended, empty if no rank was lost; None if the log does not say."""
        end = self.segments[-1].end
        return None if end is None else end.cause

    def records(self) -> Iterator[step_log_pb2.StepLogRecord]:
        """Commands and reports in the order in which the engine sent and read them."""
        for segment in self.segments:
            with segment.path.open("rb") as file:
                for record in _records(file, segment.path):
                    kind = record.WhichOneof("record")
                    if kind == "command" and command_id(record.command) > self.last_command:
                        return
                    if kind in ("command", "report"):
                        yield record


def open_log(path: Path, epoch: int | None = None, last_command: int | None = None) -> RecordedRun:
    """Finds what to replay: all of the newest epoch, or of `epoch`, up to `last_command`.

    `path` is the log's FILE, or one segment FILE.N to begin with. Raises BadStepLog, naming what is
    missing, also where a gap would have to be crossed.
    """
    segments, notes = _read_segments(path)
    epochs = list(dict.fromkeys(segment.header.epoch for segment in segments))
    chosen = epochs[-1] if epoch is None else epoch
    if chosen not in epochs:
        raise BadStepLog(path, f"holds no epoch {epoch}; it has {_listed(epochs)}")
    if epoch is None and len(epochs) > 1:
        notes.append(f"the log has the epochs {_listed(epochs)}; this is the newest")
    own = [segment for segment in segments if segment.header.epoch == chosen]
    first = own[0].snapshot.command_id + 1
    if last_command is not None and last_command < first:
        raise BadStepLog(own[0].path, f"begins with command {first}, after {last_command}")
    end = own[-1].last_command if last_command is None else last_command
    _check_whole(own, last_command)
    if own[-1].is_truncated:
        notes.append(f"{own[-1].path} ends within a record; what is whole is replayed")
    if own[-1].end is None:
        notes.append("the log has no end: its coordinator was killed, or still runs")
    return RecordedRun(own, end, notes)


def command_id(record: step_log_pb2.StepLogCommand) -> int:
    """The number of a logged command."""
    return worker_pb2.ExecuteRequest.FromString(record.request).command.command_id


def _read_segments(path: Path) -> tuple[list[Segment], list[str]]:
    try:
        files = _from_segment(path) if path.is_file() else find_segments(path)
    except OSError as error:
        raise BadStepLog(path, str(error)) from None
    segments, notes = list[Segment](), list[str]()
    for file in files:
        segment = _read_segment(file)
        if segment is None:
            notes.append(f"{file} ends within its first records and is passed over")
        else:
            segments.append(segment)
    if not segments:
        raise BadStepLog(path, f"no segment {path}.0, {path}.1, ... and no segment of that name")
    return segments, notes


def _from_segment(path: Path) -> list[Path]:
    """The segment `path` and its successors."""
    base, _, number = path.name.rpartition(".")
    if not base or not number.isdigit():
        raise BadStepLog(path, "is no segment FILE.N of a step log")
    segments = find_segments(path.with_name(base))
    return [segment for segment in segments if segment_number(segment) >= int(number)]


def _read_segment(path: Path) -> Segment | None:
    """Looks through a file; None if it does not hold even its snapshot."""
    last_command, gap, end, size = 0, None, None, 0
    header, snapshot = None, None
    with path.open("rb") as file:
        for record in _records(file, path):
            size = file.tell()
            kind = record.WhichOneof("record")
            if kind == "header":
                header = _checked(record.header, path)
            elif header is None:
                raise BadStepLog(path, f"begins with {kind or 'nothing known'}, not a header")
            elif kind == "snapshot":
                snapshot, last_command = record.snapshot, record.snapshot.command_id
            elif kind == "command":
                last_command = command_id(record.command)
            elif kind == "gap":
                gap = record.gap
            elif kind == "end":
                end = record.end
    if header is None or snapshot is None:
        return None
    is_truncated = size < path.stat().st_size
    return Segment(path, header, snapshot, last_command, gap, end, is_truncated)


def _records(file: BinaryIO, path: Path) -> Iterator[step_log_pb2.StepLogRecord]:
    """The whole records of a file; what a crash has left of the last one is not among them."""
    while len(head := file.read(4)) == 4:
        offset = file.tell()
        data = file.read(int.from_bytes(head, "little"))
        if len(data) < int.from_bytes(head, "little"):
            return
        try:
            record = step_log_pb2.StepLogRecord.FromString(data)
        except DecodeError as error:
            raise BadStepLog(path, f"no record at byte {offset}: {error}") from None
        if record.WhichOneof("record") is None:
            raise BadStepLog(path, f"no record that this version knows at byte {offset}")
        yield record


def _checked(header: step_log_pb2.StepLogHeader, path: Path) -> step_log_pb2.StepLogHeader:
    if header.format_version != FORMAT_VERSION:
        raise BadStepLog(
            path, f"has format version {header.format_version}; this version reads {FORMAT_VERSION}"
        )
    return header


def _check_whole(segments: Sequence[Segment], last_command: int | None) -> None:
    """Raises BadStepLog for the first thing that is missing, up to `last_command` if given."""
    for segment, successor in zip(segments, [*segments[1:], None], strict=True):
        if last_command is not None and last_command <= segment.last_command:
            return
        problem = _missing_after(segment, successor)
        if problem:
            onward = f", or from {successor.path} on" if successor is not None else ""
            raise BadStepLog(
                segment.path,
                f"{problem}; replay up to it with --last-command {segment.last_command}{onward}",
            )
    if last_command is not None:
        final = segments[-1]
        raise BadStepLog(
            final.path, f"ends with command {final.last_command}, before {last_command}"
        )


def _missing_after(segment: Segment, successor: Segment | None) -> str:
    """What lies between two segments and is not there; empty if nothing."""
    if segment.gap is not None:
        return (
            f"a gap: {segment.gap.dropped_count} records after command {segment.gap.command_id} "
            f"were dropped"
        )
    if successor is None:
        return ""
    if segment.is_truncated or successor.snapshot.command_id != segment.last_command:
        return (
            f"a gap: not all after command {segment.last_command} is there, the next segment "
            f"follows command {successor.snapshot.command_id}"
        )
    return ""


def _listed(epochs: Sequence[int]) -> str:
    return ", ".join(map(str, epochs))
