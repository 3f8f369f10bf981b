"""Step logs for tests: recorded from an engine with fake ranks, replayed, tampered with."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from coordinator.metrics import EngineMetrics
from coordinator.replay import ReplayOptions, replay
from coordinator.replay_report import ReplayReport
from coordinator.step_log import StepLog
from coordinator.step_log_files import find_segments
from coordinator.step_log_reader import open_log
from protos.lockstep.v1 import generate_pb2, step_log_pb2
from tests.helpers.engine_harness import Harness, running_group
from tests.helpers.fake_worker import FakeSettings, FakeWorker

RING_BYTES = 160_000  # goes round under `num_requests=200`
_ABORTED = generate_pb2.FINISH_REASON_ABORTED
Record = step_log_pb2.StepLogRecord


def record_mixed_load(
    path: Path, max_bytes: int = 1 << 20, num_requests: int = 40, **config: Any
) -> EngineMetrics:
    """Preemptions, chunked prompts, shared prefixes, stop ids and aborts on two fake ranks."""

    async def body(group: Harness) -> None:
        draw = random.Random(5)
        for handle in range(1, num_requests + 1):
            prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9] if handle % 2 else []
            prompt += [draw.randrange(1000) for _ in range(draw.randint(1, 15))]
            stop_ids = [draw.randrange(1000)] if handle % 3 == 0 else []
            max_tokens = draw.randint(2, 43 - len(prompt))
            group.submit(handle, prompt, max_tokens, stop_ids=stop_ids, use_prefix_cache=True)
        await group.heard.end_of(1)
        for handle in (num_requests // 2, num_requests):
            if handle not in group.heard.ended:
                group.book.finish(group.book._by_handle[0, handle], _ABORTED)
                group.leader.wake()
        await group.heard.end_of(*range(1, num_requests + 1))
        await group.settled()

    settings = [FakeSettings(num_blocks=12) for _ in range(2)]
    return record(path, body, settings, max_bytes, max_batch_tokens=16, **config)


def record(
    path: Path,
    body: Callable[[Harness], Any],
    settings: Sequence[FakeSettings] = (),
    max_bytes: int = 1 << 20,
    **config: Any,
) -> EngineMetrics:
    """Runs `body` on a group whose engine logs to `path`."""
    metrics = EngineMetrics("fake")

    async def run() -> None:
        with StepLog(path, max_bytes, metrics) as log:
            async with running_group(settings, metrics=metrics, step_log=log, **config) as group:
                await body(group)

    asyncio.run(run())
    return metrics


def replay_on(path: Path, settings: Sequence[FakeSettings], **changes: Any) -> ReplayReport:
    """Replays on fake ranks."""

    async def run() -> ReplayReport:
        workers = [FakeWorker(one) for one in settings]
        addresses = tuple([await worker.serve() for worker in workers])
        try:
            options = replay_options(path, addresses, **changes)
            return await replay(options, open_log(path, options.epoch, options.last_command))
        finally:
            for worker in workers:
                await worker.stop()

    return asyncio.run(run())


def replay_options(path: Path, addresses: tuple[str, ...], **changes: Any) -> ReplayOptions:
    values: dict[str, Any] = {
        "log": path,
        "workers": addresses,
        "model": None,
        "pace": "max",
        "epoch": None,
        "last_command": None,
        "step_timeout": 10.0,
        "startup_timeout": 10.0,
        "is_simulated": False,
        "end_workers": False,
        "as_json": False,
    }
    return ReplayOptions(**(values | changes))


def read_records(segment: Path) -> list[Record]:
    """All whole records of a file."""
    return [record for record, _ in _framed_records(segment.read_bytes())]


def rewrite(segment: Path, change: Callable[[Record], Record | None]) -> None:
    """Passes every record through `change`; None removes it."""
    changed = [change(record) for record in read_records(segment)]
    segment.write_bytes(b"".join(framed(record) for record in changed if record is not None))


def framed(record: Record) -> bytes:
    data = record.SerializeToString()
    return len(data).to_bytes(4, "little") + data


def segments(path: Path) -> list[Path]:
    return find_segments(path)


def first_with_slots(path: Path) -> Path:
    """The oldest segment whose snapshot has something to rebuild."""
    for segment in find_segments(path):
        if open_log(segment).snapshot.slots:
            return segment
    raise AssertionError("no segment begins in the middle of a request")


def _framed_records(data: bytes) -> Iterator[tuple[Record, int]]:
    offset = 0
    while offset + 4 <= len(data):
        end = offset + 4 + int.from_bytes(data[offset : offset + 4], "little")
        if end > len(data):
            return
        yield Record.FromString(data[offset + 4 : end]), end
        offset = end
