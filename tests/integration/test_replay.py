"""A step log of `lockstep serve --step-log` run again on real ranks by `lockstep replay`."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from coordinator.step_command import pack_int32, unpack_int32
from lockstep.daemon.exit_codes import ExitCode
from protos.lockstep.v1 import generate_pb2
from tests.helpers.message_client import ids_request
from tests.helpers.served_group import ServedGroup, serve_environ, value_of
from tests.helpers.step_logs import Record, rewrite, segments
from tests.integration.conftest import CPU_FLAGS
from tests.integration.test_batching import Stream, abort, with_stub

pytestmark = pytest.mark.timeout(240)
_LIMIT_S = 150.0
# 48 blocks of 16 tokens for 24 requests of up to 160: some are preempted.
_FLAGS = ("--tp", "2", "--max-model-len", "256", "--kv-cache-bytes", "196K", *CPU_FLAGS)
_STEP_FLAGS = ("--max-num-seqs", "16", "--max-batch-tokens", "48")


def requests(num_requests: int = 24) -> list[generate_pb2.GenerateRequest]:
    """Greedy and seeded, some with penalties."""
    draw = np.random.default_rng(3)
    made = []
    for index in range(num_requests):
        prompt = draw.integers(3, 301, draw.integers(3, 90)).tolist()
        sampling: dict[str, Any] = {"temperature": 0.0}
        if index % 2:
            sampling = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.3}
        request = ids_request(prompt, max_tokens=60, seed=index, ignore_eos=True, **sampling)
        request.request_id = f"replayed-{index}"
        made.append(request)
    return made


async def _load(stub: Any) -> None:
    streams = [Stream(stub, request) for request in requests()]
    await streams[2].received(5)
    await abort(stub, streams[2])
    streams[3].call.cancel()
    for stream in streams:
        await stream.ended


@pytest.fixture(scope="module")
def log(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded under load, with preemptions and aborts."""
    folder = tmp_path_factory.mktemp("recorded")
    path = folder / "steps"
    flags = (*_FLAGS, *_STEP_FLAGS, "--step-log", str(path))
    with ServedGroup(tiny_dir, folder / "group", *flags) as group:
        with_stub(group, _load)
        assert value_of(group.metrics, "lockstep_preemptions_total") > 0
        assert value_of(group.metrics, "lockstep_step_log_up") == 1
        assert value_of(group.metrics, "lockstep_step_log_dropped_total") == 0
    return path


def run_replay(folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, JSON line, all output) of `lockstep replay`."""
    finished = subprocess.run(
        [sys.executable, "-P", "-m", "lockstep.cli", "replay", *words, "--json"],
        env={**serve_environ(folder), "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    lines = finished.stdout.splitlines()
    record = json.loads(lines[-1]) if lines else {}
    return finished.returncode, record, finished.stdout + finished.stderr


def _start_words(log: Path, model: Path) -> tuple[str, ...]:
    words = ("--tp", "2", "--model", str(model), "--devices", "cpu", "--num-threads", "1")
    return (str(log), *words)


def test_a_log_of_real_ranks_replays_with_identical_tokens(
    log: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    code, record, output = run_replay(tmp_path, *_start_words(log, tiny_dir))
    assert code == ExitCode.CLEAN, output
    assert record["different_tokens"] == 0 and record["lost"] is None
    assert record["steps_compared"] == record["steps_replayed"] > 60
    assert record["step_micros"]["recorded"]["p50"] > 0
    assert len(record["slowest"]) == 10 and "slowest steps:" in output


def test_a_planted_wrong_token_is_found_on_real_ranks(
    log: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "steps.0"
    copy.write_bytes(segments(log)[0].read_bytes())
    planted: list[tuple[int, int]] = []

    def plant(entry: Record) -> Record:
        result = entry.report.response.result
        tokens = unpack_int32(result.token_ids)
        if not planted and result.step == 40:
            planted.append((result.command_id, tokens[0]))
            result.token_ids = pack_int32([tokens[0] + 1, *tokens[1:]])
        return entry

    rewrite(copy, plant)
    code, record, output = run_replay(tmp_path, *_start_words(tmp_path / "steps", tiny_dir))
    assert code == 1, output
    assert record["different_tokens"] == 1
    first = record["first_difference"]
    ((command_id, token),) = planted
    assert (first["command_id"], first["step"], first["entry"]) == (command_id, 40, "row 0")
    assert (first["recorded"], first["replayed"]) == (token + 1, token)


def test_a_stopped_rank_is_a_hang_of_that_rank(log: Path, tiny_dir: Path, tmp_path: Path) -> None:
    words = _start_words(log, tiny_dir)
    # At the recorded pace the replay lasts long enough to be stopped in the middle.
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "lockstep.cli", "replay", *words),
            *("--pace", "recorded", "--step-timeout", "2", "--json"),
        ],
        env={**serve_environ(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "replaying commands" in line:
            break
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "worker" in child.cmdline()]
    assert len(workers) == 2, said
    _, rank_1 = sorted(workers, key=lambda child: child.create_time())
    rank_1.send_signal(signal.SIGSTOP)
    output, errors = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == ExitCode.GROUP_LOST, "".join(said) + output + errors
    record = json.loads(output.splitlines()[-1])
    assert record["lost"]["rank"] == 1 and record["lost"]["command_id"] > 0, output


def test_another_checkpoint_is_refused(log: Path, tmp_path: Path, smollm2_dir: Path) -> None:
    code, _, output = run_replay(tmp_path, *_start_words(log, smollm2_dir))
    assert code == ExitCode.CHECKPOINT and "recorded with the checkpoint of digest" in output


def test_a_full_disk_ends_the_log_and_not_the_service(tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "steps"
    flags = (*_FLAGS, *_STEP_FLAGS, "--step-log", str(path))
    with ServedGroup(tiny_dir, tmp_path / "group", *flags) as group:
        (coordinator,) = [
            child
            for child in group.members()
            if child.cmdline()[3:4] == ["coordinator"] and child.ppid() == group.process.pid
        ]
        limit = segments(path)[0].stat().st_size + 4096
        resource.prlimit(coordinator.pid, resource.RLIMIT_FSIZE, (limit, limit))
        with_stub(group, _load)
        assert value_of(group.metrics, "lockstep_step_log_up") == 0
        assert value_of(group.metrics, "lockstep_step_log_dropped_total") > 0
        with_stub(group, _load)
        assert group.log_text().count("the step log stops here, serving goes on") == 1
    assert segments(path)[0].stat().st_size <= limit
    code, record, output = run_replay(tmp_path, *_start_words(path, tiny_dir))
    assert code == ExitCode.CLEAN, output
    assert any("ends within a record" in note for note in record["notes"])


def test_a_folder_that_is_not_there_stops_the_start(tiny_dir: Path, tmp_path: Path) -> None:
    flags = (*_FLAGS, "--step-log", str(tmp_path / "none" / "steps"))
    group = ServedGroup(tiny_dir, tmp_path / "group", *flags, environ=dict(os.environ))
    assert group.wait_exit() == ExitCode.CONFIG
    assert "--step-log" in group.log_text() and "No such file" in group.log_text()
