"""The step log's writer: never waits, stays in its bounds, says what it lacks."""

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.errors import BadStepLog
from coordinator.metrics import EngineMetrics
from coordinator.step_command import CommandEncoder
from coordinator.step_log import StepLog
from coordinator.step_log_files import SegmentRing, find_segments
from coordinator.step_log_reader import open_log
from protos.lockstep.v1 import step_log_pb2, worker_pb2
from tests.helpers.step_logs import read_records

_LIMIT_S = 10.0
_MIB = 1 << 20


class Writer:
    """A log that is fed commands of a wanted size."""

    def __init__(self, path: Path, max_bytes: int = 4 * _MIB) -> None:
        self.metrics = EngineMetrics("m")
        self.log = StepLog(path, max_bytes, self.metrics)
        self.begin(7)

    def begin(self, epoch: int) -> None:
        self.encoder = CommandEncoder(epoch)
        self.log.begin_epoch(epoch, "0.0", "digest", worker_pb2.EngineConfig(), 1, 9)

    def send(self, num_bytes: int = 100) -> None:
        delta = worker_pb2.TableDelta(chunk_token_ids=bytes(num_bytes)).SerializeToString()
        self.log.sent(self.encoder.encode(delta, 1, b""), self.encoder.last_command_id)

    def next_segment(self) -> None:
        self.log.begin_segment(
            step_log_pb2.StepLogSnapshot(
                command_id=self.encoder.last_command_id, step=self.encoder.last_step
            )
        )

    def wait(self, is_met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not is_met():
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_what_is_written_is_read_in_order_and_the_file_is_the_owners(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "log")
    for _ in range(5):
        writer.send()
        result = worker_pb2.StepResult(step=writer.encoder.last_step)
        writer.log.received(0, worker_pb2.ExecuteResponse(result=result))
    writer.log.close()
    (segment,) = find_segments(tmp_path / "log")
    assert os.stat(segment).st_mode & 0o777 == 0o600
    kinds = [record.WhichOneof("record") for record in read_records(segment)]
    assert kinds == ["header", "snapshot", *["command", "report"] * 5, "end"]
    log = open_log(tmp_path / "log")
    assert (log.last_command, log.cause, log.notes) == (5, "", [])
    assert len(list(log.records())) == 10


def test_a_segment_is_due_before_it_is_full_and_a_new_one_ends_that(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "log")
    while not (writer.log.is_due or writer.metrics.step_log_dropped):
        writer.send(10_000)
    writer.send(10_000)
    writer.next_segment()
    assert not writer.log.is_due
    writer.log.close()
    assert writer.metrics.step_log_dropped == 0
    assert len(open_log(tmp_path / "log").segments) == 2


def test_files_of_earlier_runs_count_and_go_first(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for number in (3, 4, 5):
        (tmp_path / f"log.{number}").write_bytes(bytes(_MIB))
    (tmp_path / "log.txt").write_bytes(bytes(_MIB))
    writer = Writer(path, max_bytes=3 * _MIB)
    writer.log.close()
    assert [segment.name for segment in find_segments(path)] == ["log.4", "log.5", "log.6"]
    assert (tmp_path / "log.txt").exists()


def test_a_slow_disk_costs_whole_records_and_a_gap_never_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.step_log._MAX_PENDING_BYTES", 4096)
    path, write = tmp_path / "log", SegmentRing.write
    is_stuck, is_free = threading.Event(), threading.Event()
    is_free.set()

    def slow(ring: SegmentRing, items: Sequence[bytes | None]) -> None:
        is_stuck.set()
        assert is_free.wait(_LIMIT_S)
        write(ring, items)

    monkeypatch.setattr(SegmentRing, "write", slow)
    writer = Writer(path)
    writer.wait(lambda: bool(find_segments(path)))
    is_free.clear()
    writer.send()
    is_stuck.clear()
    assert is_stuck.wait(_LIMIT_S)
    for _ in range(100):
        writer.send()
    num_dropped = writer.metrics.step_log_dropped
    assert 50 < num_dropped < 100 and not writer.log.is_due
    is_free.set()
    writer.wait(lambda: writer.log.is_due)
    writer.send()  # not before the next segment begins
    writer.next_segment()
    writer.send()
    writer.log.close()
    assert writer.metrics.step_log_dropped == num_dropped + 1
    last_kept = 101 - num_dropped
    first, second = find_segments(path)
    with pytest.raises(
        BadStepLog, match=f"{num_dropped + 1} records after command {last_kept} were dropped"
    ):
        open_log(path)
    assert open_log(path, last_command=last_kept).last_command == last_kept
    assert open_log(second).last_command == 103


def test_records_that_a_segment_has_no_room_for_are_a_gap(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "log", max_bytes=_MIB)
    for _ in range(30):
        writer.send(10_000)
    writer.log.close()
    assert writer.metrics.step_log_dropped > 0
    assert sum(file.stat().st_size for file in find_segments(tmp_path / "log")) <= _MIB // 4
    with pytest.raises(BadStepLog, match="a gap"):
        open_log(tmp_path / "log")


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_the_log_once_and_counts_what_follows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with file_size_limit(5000):
        writer = Writer(tmp_path / "log")
        assert writer.metrics.step_log_up
        for _ in range(40):
            writer.send()
        writer.wait(lambda: not writer.metrics.step_log_up)
        num_dropped = writer.metrics.step_log_dropped
        assert num_dropped > 0
        writer.send()
        writer.next_segment()
        assert not writer.log.is_due
        writer.log.close()
    assert writer.metrics.step_log_dropped == num_dropped + 1
    assert caplog.text.count("serving goes on") == 1
    log = open_log(tmp_path / "log")
    assert 0 < log.last_command < 40 and len(log.notes) == 2


def test_a_snapshot_that_leaves_no_room_stops_the_log_and_says_what_to_raise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Writer(tmp_path / "log", max_bytes=_MIB)
    slot = step_log_pb2.StepLogSlot(token_ids=bytes(200_000))
    writer.log.begin_segment(step_log_pb2.StepLogSnapshot(slots=[slot]))
    writer.log.close()
    assert not writer.metrics.step_log_up
    assert "raise --step-log-bytes" in caplog.text


def test_a_folder_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StepLog(tmp_path / "none" / "log", _MIB, EngineMetrics("m"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x03\0\0\0\xff\xff\xff", "no record at byte 4"),
        (b"\0\0\0\0", "no record that this version knows at byte 4"),
        (b"\x02\0\0\0\x1a\0", "begins with command, not a header"),
    ],
)
def test_what_is_no_log_is_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "log.0").write_bytes(content)
    with pytest.raises(BadStepLog, match=words):
        open_log(tmp_path / "log")


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    header = step_log_pb2.StepLogHeader(format_version=2)
    data = step_log_pb2.StepLogRecord(header=header).SerializeToString()
    (tmp_path / "log.0").write_bytes(len(data).to_bytes(4, "little") + data)
    with pytest.raises(BadStepLog, match="format version 2; this version reads 1"):
        open_log(tmp_path / "log")


def test_no_log_is_said_with_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(BadStepLog, match=r"no segment .*log\.0"):
        open_log(tmp_path / "log")
    (tmp_path / "other").write_text("")
    with pytest.raises(BadStepLog, match="is no segment FILE.N"):
        open_log(tmp_path / "other")
