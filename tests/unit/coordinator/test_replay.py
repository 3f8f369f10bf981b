"""Logs of an engine with fake ranks, replayed: the same, tampered with, on ranks that fail."""

from pathlib import Path

import pytest

from coordinator.errors import BadStepLog, StartRefused
from coordinator.replay import check_fit
from coordinator.step_command import pack_int32, unpack_int32
from coordinator.step_log_reader import command_id, open_log
from lockstep.daemon.exit_codes import ExitCode
from protos.lockstep.v1 import worker_pb2
from tests.helpers.engine_harness import Harness
from tests.helpers.fake_worker import FakeSettings, successor
from tests.helpers.step_logs import (
    RING_BYTES,
    Record,
    first_with_slots,
    framed,
    read_records,
    record,
    record_mixed_load,
    replay_on,
    replay_options,
    rewrite,
    segments,
)


def ranks(num_blocks: int = 12) -> list[FakeSettings]:
    return [FakeSettings(num_blocks=num_blocks, rebuilds_shared=True) for _ in range(2)]


@pytest.mark.parametrize("pace", ["max", "recorded"])
def test_a_log_with_preemptions_and_aborts_replays_with_the_same_tokens(
    tmp_path: Path, pace: str
) -> None:
    metrics = record_mixed_load(tmp_path / "log")
    assert metrics.preemptions > 0 and metrics.step_log_dropped == 0
    report = replay_on(tmp_path / "log", ranks(), pace=pace)
    assert report.lost is None and report.comparison.first is None
    assert report.exit_code == ExitCode.CLEAN
    assert report.log.cause == ""
    assert report.comparison.num_compared == report.comparison.num_replayed > 100


def test_a_planted_wrong_token_is_found_at_its_step_and_row(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record_mixed_load(path)
    planted: list[tuple[int, int, int]] = []
    decoding = decode_commands(path, num_rows=2, first=60)

    def plant(entry: Record) -> Record:
        result = entry.report.response.result
        tokens = unpack_int32(result.token_ids)
        if not planted and result.command_id in decoding and min(tokens) >= 0:
            planted.append((result.command_id, result.step, tokens[1]))
            tokens[1] += 1
            result.token_ids = pack_int32(tokens)
        return entry

    rewrite(segments(path)[0], plant)
    report = replay_on(path, ranks())
    ((command_id, step, token),) = planted
    first = report.comparison.first
    assert first is not None and report.comparison.num_different == 1
    assert (first.command_id, first.step, first.entry) == (command_id, step, "row 1")
    assert (first.recorded, first.replayed) == (token + 1, token)
    assert report.exit_code == 1
    assert f"step {step}, row 1" in report.text()


def test_ranks_that_choose_another_token_are_found(tmp_path: Path) -> None:
    record_mixed_load(tmp_path / "log")
    settings = ranks()
    settings[0].choose_token = lambda ids: successor(ids) if len(ids) < 20 else 5
    report = replay_on(tmp_path / "log", settings)
    assert report.exit_code == 1 and report.comparison.num_different > 1
    assert report.comparison.first is not None and report.comparison.first.replayed == 5


def test_a_rank_that_stalls_is_named_with_its_command(tmp_path: Path) -> None:
    record_mixed_load(tmp_path / "log")
    settings = ranks()
    settings[1].stall_at_command = 33
    report = replay_on(tmp_path / "log", settings, step_timeout=0.5)
    assert report.lost is not None
    assert (report.lost.rank, report.lost.command_id) == (1, 33)
    assert report.exit_code == ExitCode.GROUP_LOST
    assert "rank 1 at command 33" in report.text()


def test_a_rank_that_fails_is_named_with_its_command_after_a_rebuilt_snapshot(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    record_mixed_load(path, RING_BYTES, 200)
    settings = ranks()
    settings[0].fail_at_command = 40
    report = replay_on(first_with_slots(path), settings)
    first = report.log.snapshot.command_id
    assert first > 0 and report.lost is not None
    assert report.lost.rank == 0 and first < report.lost.command_id <= first + 40
    assert "planted failure" in report.lost.problem


def test_the_ring_stays_within_its_bytes_and_replays_from_its_oldest_segment(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    metrics = record_mixed_load(path, RING_BYTES, 200)
    assert metrics.step_log_dropped == 0
    left = segments(path)
    assert sum(segment.stat().st_size for segment in left) <= RING_BYTES
    assert len(left) >= 3 and left[0].name != "log.0", "the ring has not gone round"
    assert all(segment.stat().st_mode & 0o777 == 0o600 for segment in left)
    assert first_with_slots(path)
    for start in (path, *left[1:]):
        report = replay_on(start, ranks())
        assert report.exit_code == ExitCode.CLEAN, report.text()
        assert report.comparison.num_compared == report.comparison.num_replayed > 0


def test_a_token_of_the_snapshot_that_does_not_come_again_is_said(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record_mixed_load(path, RING_BYTES, 200)

    def plant(entry: Record) -> Record:
        for slot in entry.snapshot.slots:
            if slot.prefilled_count == slot.open.prefill_len:
                tokens = unpack_int32(slot.token_ids)
                slot.token_ids = pack_int32([*tokens[:-1], (tokens[-1] + 1) % 1000])
                break
        return entry

    segment = first_with_slots(path)
    rewrite(segment, plant)
    report = replay_on(segment, ranks())
    assert report.exit_code == 1
    assert "rebuilt from the snapshot" in str(report.comparison.first)


def test_a_truncated_last_record_is_said_and_the_rest_replayed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record_mixed_load(path)
    (segment,) = segments(path)
    segment.write_bytes(segment.read_bytes()[:-1000])
    report = replay_on(path, ranks())
    assert report.exit_code == ExitCode.CLEAN
    assert report.log.cause is None
    assert any("ends within a record" in note for note in report.log.notes)
    assert report.comparison.num_compared > 50


def test_a_gap_is_not_crossed_and_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record_mixed_load(path)
    (segment,) = segments(path)
    entries = read_records(segment)
    gap = Record()
    gap.gap.dropped_count, gap.gap.command_id = 7, 50
    ids = [_command_id(entry) for entry in entries]
    cut = ids.index(50) + 1
    segment.write_bytes(b"".join(framed(entry) for entry in [*entries[:cut], gap]))
    with pytest.raises(BadStepLog, match="7 records after command 50 .*--last-command 50"):
        open_log(path)
    assert replay_on(path, ranks(), last_command=50).exit_code == ExitCode.CLEAN


def test_a_segment_missing_in_the_middle_is_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record_mixed_load(path, RING_BYTES, 200)
    left = segments(path)
    left[1].unlink()
    with pytest.raises(BadStepLog, match=f"a gap: .* or from {left[2]} on"):
        open_log(path)
    assert replay_on(left[2], ranks()).exit_code == ExitCode.CLEAN


def test_a_hang_is_in_the_log_by_its_cause_and_the_next_epoch_is_apart(tmp_path: Path) -> None:
    path = tmp_path / "log"
    settings = [FakeSettings(), FakeSettings()]

    async def body(group: Harness) -> None:
        settings[1].fail_at_command = 8
        group.submit(1, [1, 2, 3], 20)
        await group.heard.end_of(1)
        settings[1].fail_at_command = 0
        await group.restart_workers()
        await group.heard.until(lambda: group.heard.states[-1].is_ready)
        group.submit(2, [1, 2, 3], 5)
        await group.heard.end_of(2)

    record(path, body, settings)
    newest = open_log(path)
    assert newest.cause == "" and any("epochs" in note for note in newest.notes)
    lost = open_log(path, newest.header.epoch - 1)
    assert lost.cause is not None and lost.cause.startswith("rank 1 lost at step")
    report = replay_on(path, [FakeSettings(), FakeSettings()], epoch=lost.header.epoch)
    assert report.exit_code == ExitCode.CLEAN
    with pytest.raises(BadStepLog, match="holds no epoch 1"):
        open_log(path, 1)


def test_another_number_of_ranks_or_checkpoint_is_refused_naming_both(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record_mixed_load(path, num_requests=3)
    log = open_log(path)
    with pytest.raises(StartRefused, match="recorded with 2 ranks, --workers names 1"):
        check_fit(replay_options(path, ("a:1",)), log)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartRefused, match="digest digest, --model .* has ") as refused:
        check_fit(replay_options(path, ("a:1", "b:1"), model=tmp_path), log)
    assert refused.value.exit_code == ExitCode.CHECKPOINT
    with pytest.raises(StartRefused, match="recorded with 12 KV blocks; rank 1 has room for 9"):
        replay_on(path, [FakeSettings(num_blocks=12), FakeSettings(num_blocks=9)])
    with pytest.raises(StartRefused, match="holds a checkpoint with digest other"):
        replay_on(path, [FakeSettings(num_blocks=12), FakeSettings(digest="other")])


def test_the_group_has_the_recorded_configuration(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record_mixed_load(path, num_requests=3, max_model_len=40, use_graphs=False)
    header = open_log(path).header
    assert header.config.max_model_len == 40 and not header.config.use_graphs
    assert (header.block_count, header.config.block_size) == (12, 4)
    assert replay_on(path, ranks(num_blocks=64)).exit_code == ExitCode.CLEAN


def decode_commands(path: Path, num_rows: int, first: int) -> set[int]:
    """Commands from `first` on with that many rows and no chunks."""
    found = set[int]()
    for entry in open_log(path).records():
        if _command_id(entry) >= first:
            command = worker_pb2.ExecuteRequest.FromString(entry.command.request).command
            delta = worker_pb2.TableDelta.FromString(command.delta)
            if delta.row_count == num_rows and not delta.chunks and command.step_count:
                found.add(command.command_id)
    assert found, "the load has no such command"
    return found


def _command_id(entry: Record) -> int:
    return command_id(entry.command) if entry.HasField("command") else 0


def test_a_segment_begins_without_cached_blocks_that_a_replay_could_not_fill(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"

    async def body(group: Harness) -> None:
        # In turns, so that in the middle of one prompt the blocks of the other have no owner.
        for handle in range(1, 121):
            prompt = [500 * (handle % 2) + index for index in range(16)]
            group.submit(handle, prompt, 20, use_prefix_cache=True)
            await group.heard.end_of(handle)
        assert group.metrics.prefix_cache_hits > 500

    record(path, body, ranks(64), RING_BYTES)
    left = segments(path)
    assert len(left) >= 3
    for segment in left:
        report = replay_on(segment, ranks(64))
        assert report.exit_code == ExitCode.CLEAN, report.text()
