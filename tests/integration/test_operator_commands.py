"""`lockstep status`, `doctor --bundle` and `drain` against running groups of simulated ranks."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.daemon.version import __version__
from tests.helpers.message_client import text_request
from tests.helpers.served_group import ServedGroup, serve_environ, value_of
from tests.integration.chaos_support import running_streams, wait_until

pytestmark = pytest.mark.timeout(240)

_LIMIT_S = 100.0
_SECRET = "planted-8f41c2"
_PROMPT = "Colourless green ideas sleep furiously tonight"


def run_command(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lockstep", *words],
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        cwd=Path(__file__).parents[2],
        env=serve_environ(Path("/tmp")) | environ,
        check=False,
    )


@pytest.fixture(scope="module")
def model_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and tokenizer without weights."""
    folder = tmp_path_factory.mktemp("no-weights")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / name, folder / name)
    return folder


@contextlib.contextmanager
def simulated(model_dir: Path, folder: Path, *flags: str) -> Iterator[ServedGroup]:
    # What a careless operator's environment holds reaches the daemons' processes.
    environ = serve_environ(folder, HF_TOKEN=_SECRET, OTEL_EXPORTER_OTLP_HEADERS=f"x={_SECRET}")
    group = ServedGroup(
        model_dir, folder, "--tp", "2", *flags, subcommand="simulate", environ=environ
    )
    with group:
        yield group


def test_json_logs_name_request_rank_epoch_and_step_of_a_loss(
    model_dir: Path, tmp_path: Path
) -> None:
    with simulated(model_dir, tmp_path / "group", "--log-format", "json") as group:
        with running_streams(group.address, 2, max_tokens=5000) as streams:
            with group.client() as client:
                server = client.server_info()
            workers = {each.pid: each for each in group.members()}
            workers[server.ranks[1].pid].kill()
            assert all(end.error for end in streams.ends(_LIMIT_S))
        lines = [line for line in group.log_text().splitlines() if line.startswith("{")]
    found = [json.loads(line) for line in lines]
    lost = [each for each in found if each["message"].startswith("not ready: rank 1")]
    assert lost and all(each["rank"] == 1 and each["step"] > 0 for each in lost)
    assert {each["epoch"] for each in lost} == {server.epoch}
    failed = [each for each in found if each["message"].startswith("request ")]
    assert len({each["request_id"] for each in failed}) == 2
    assert all(each["epoch"] == server.epoch for each in failed)


def test_status_tells_of_ranks_before_and_after_a_loss(model_dir: Path, tmp_path: Path) -> None:
    with simulated(model_dir, tmp_path / "group") as group:
        shown = run_command("status", "--address", group.address)
        assert shown.returncode == 0, shown.stderr
        assert f"lockstep {__version__}, SERVING" in shown.stdout
        assert "last loss  none" in shown.stdout
        workers = [each for each in group.members() if "worker.simulated" in each.cmdline()]
        assert all(str(each.pid) in shown.stdout for each in workers)
        with group.client() as client:
            epoch, victim = client.server_info().epoch, client.server_info().ranks[1].pid
            next(each for each in workers if each.pid == victim).kill()

            def is_back() -> bool:
                server = client.server_info()
                return server.is_ready and server.epoch > epoch

            wait_until(is_back, _LIMIT_S, group.log_text)
        found = json.loads(run_command("status", "--json", "--address", group.address).stdout)
        assert found["server"]["last_loss"].startswith("rank 1 lost at step")
        assert "stream broke" in found["server"]["ranks"][1]["last_error"]
        assert found["server"]["ranks"][0]["version"] == __version__
        losses = [value_of(group.metrics, "lockstep_rank_losses_total", rank=r) for r in "01"]
        assert losses == [0, 1]


def test_status_of_nobody_fails_and_says_so() -> None:
    shown = run_command("status", "--address", "127.0.0.1:1")
    assert shown.returncode == 1
    assert "no server answers" in shown.stderr


def test_a_bundle_holds_what_is_needed_and_neither_secret_nor_prompt(
    model_dir: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "lockstep.env"
    settings.write_text(f"LOCKSTEP_MODEL=/m\nAPI_KEY={_SECRET}\n")
    bundle = tmp_path / "bundle.tar.gz"
    with simulated(model_dir, tmp_path / "group") as group:
        with group.client() as client:
            client.generate_unary(text_request(_PROMPT, max_tokens=4), timeout_s=_LIMIT_S)
        log = tmp_path / "serve.log"
        log.write_text(f"{group.log_text()}\nclient sent authorization: Bearer {_SECRET}\n")
        made = run_command(
            *("doctor", "--bundle", str(bundle), "--address", group.address),
            *("--metrics", group.metrics, "--metrics", "127.0.0.1:1"),
            *("--log", str(log), "--log", str(tmp_path / "absent"), "--settings", str(settings)),
            MY_PASSWORD=_SECRET,
        )
    assert made.returncode == 0, made.stderr
    assert bundle.stat().st_mode & 0o077 == 0
    with tarfile.open(bundle) as archive:
        files = {
            entry.name.partition("/")[2]: (archive.extractfile(entry) or io.BytesIO())
            .read()
            .decode()
            for entry in archive.getmembers()
        }
    whole = "\n".join(files.values())
    assert _SECRET not in whole and _PROMPT not in whole and "Colourless" not in whole
    assert "LOCKSTEP_MODEL=/m" in files["settings/lockstep.env"]
    assert "lockstep_steps_total" in files[f"metrics/{group.metrics.replace(':', '-')}.txt"]
    assert "-m coordinator" in files["processes/coordinator.txt"]
    assert "worker.simulated" in files["processes/rank-1.txt"]
    assert "OTEL_EXPORTER_OTLP_HEADERS=" in files["processes/rank-1.txt"]
    assert "phase hello took" in files["logs/0-serve.log"]
    assert json.loads(files["server.json"])["server"]["version"] == __version__
    assert f"lockstep {__version__}" in files["versions.txt"] and "grpcio " in files["versions.txt"]
    assert "package" in files["doctor.txt"]
    # What there was not is named, in the bundle and to the operator.
    for missing in (
        "metrics of 127.0.0.1:1",
        "absent: No such file",
        "stall: the group was not lost",
    ):
        assert missing in files["notes.txt"] and missing in made.stderr


def test_a_bundle_of_a_host_where_nothing_runs_is_made_too(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.tar.gz"
    made = run_command("doctor", "--bundle", str(bundle), "--address", "127.0.0.1:1")
    assert made.returncode == 0, made.stderr
    assert "not in the bundle: server 127.0.0.1:1" in made.stderr
    refused = run_command("doctor", "--bundle", str(tmp_path / "no" / "folder"))
    assert refused.returncode == 2 and "No such file" in refused.stderr


def test_drain_ends_the_server_after_its_requests(model_dir: Path, tmp_path: Path) -> None:
    flags = ("--step-ms", "10", "--drain-seconds", "60")
    with simulated(model_dir, tmp_path / "group", *flags) as group:
        with running_streams(group.address, 4, max_tokens=300) as streams:
            drained = run_command("drain", "--address", group.address)
            ends = streams.ends(_LIMIT_S)
        assert drained.returncode == 0, drained.stderr
        assert "4 requests running" in drained.stderr and "has ended" in drained.stderr
        assert [(end.num_tokens, end.error) for end in ends] == [(300, None)] * 4
        assert group.wait_exit() == 0
