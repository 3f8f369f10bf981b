"""Settings of `lockstep serve` and the command lines that come of them."""

from pathlib import Path

import pytest

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.errors import ConfigError
from lockstep.serve import group_spec, main, serve_config

_CPU = ["--devices", "cpu"]


def _flag(command: object, name: str) -> str:
    words = list(command)  # type: ignore[call-overload]
    return str(words[words.index(name) + 1])


def test_flags_reach_the_daemons_that_own_them(tmp_path: Path) -> None:
    words = ["--model", str(tmp_path), "--tp", "3", "--dtype", "float32", "--step-timeout", "7"]
    words += ["--num-threads", "2", "--log-format", "json", "--metrics-host", "10.0.0.1"]
    config = serve_config([*words, *_CPU], {})
    group = group_spec(config, tmp_path, {})
    worker = group.worker_command(1, 50101, 9861, "/r")
    assert _flag(worker, "--device") == "cpu"
    assert _flag(worker, "--port") == "50101"
    assert _flag(worker, "--metrics-port") == "9861"
    assert _flag(worker, "--num-threads") == "2"
    assert "--dtype" not in worker
    coordinator = group.coordinator_command(["h:1", "h:2", "h:3"], 50051, 9851, "/r")
    assert _flag(coordinator, "--workers") == "h:1,h:2,h:3"
    assert _flag(coordinator, "--dtype") == "float32"
    assert _flag(coordinator, "--step-timeout") == "7"
    for command in (worker, coordinator):
        assert _flag(command, "--model") == str(tmp_path)
        assert _flag(command, "--ready-file") == "/r"
        assert _flag(command, "--log-format") == "json"
        assert _flag(command, "--metrics-host") == "10.0.0.1"


def test_threads_are_the_ranks_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.serve.available_cores", lambda: 7)
    model = ["--model", str(tmp_path), *_CPU]
    assert serve_config([*model, "--tp", "2"], {}).num_threads == 3
    assert serve_config([*model, "--tp", "9"], {}).num_threads == 1


def test_environment_and_file_stand_behind_flags(tmp_path: Path) -> None:
    file = tmp_path / "lockstep.toml"
    file.write_text('block-size = 1\nport = 7\ndevices = "cpu"\n', encoding="utf-8")
    environ = {"LOCKSTEP_MODEL": str(tmp_path), "LOCKSTEP_PORT": "8", "LOCKSTEP_TP": "2"}
    config = serve_config(["--config", str(file), "--tp", "1"], environ)
    assert (config.num_ranks, config.port) == (1, 8)
    assert config.passed_on == ("--block-size", "1")


def test_hub_id_is_the_served_name_and_a_folder_is_not(tmp_path: Path) -> None:
    hub = serve_config(["--model", "owner/name", *_CPU], {})
    assert hub.passed_on == ("--served-model-name", "owner/name")
    named = serve_config(["--model", "owner/name", "--served-model-name", "n", *_CPU], {})
    assert named.passed_on == ("--served-model-name", "n")
    assert serve_config(["--model", str(tmp_path), *_CPU], {}).passed_on == ()


@pytest.mark.parametrize(
    ("words", "ports"),
    [
        ([], [9860, 9861]),
        (["--metrics-port", "7000"], [7009, 7010]),
        (["--metrics-port", "0"], [0, 0]),
    ],
)
def test_ranks_have_metrics_ports_that_a_scraper_can_know(
    tmp_path: Path, words: list[str], ports: list[int]
) -> None:
    config = serve_config(["--model", str(tmp_path), "--tp", "2", *_CPU, *words], {})
    group = group_spec(config, tmp_path, {})
    assert [group.worker_metrics_port(rank) for rank in range(2)] == ports


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "m", "--tp", "2", "--metrics-port", "65526", *_CPU], "rank 1 .* port 65536"),
        ([], "--model"),
        (["--model", "m", "--tp", "0"], "--tp"),
        (["--model", "m", "--tp", "65"], "--tp is 65"),
        (["--model", "m", "--port", "70000"], "--port"),
        (["--model", "m", "--colour", "red"], "--colour"),
        (["--model", "m", "--restart", "maybe"], "--restart"),
        (["--model", "m", "--devices", "x"], "--devices"),
    ],
)
def test_bad_settings_are_refused_by_name(words: list[str], named: str) -> None:
    with pytest.raises((FlagError, ConfigError), match=named):
        serve_config(words, {})


def test_unknown_environment_setting_is_refused() -> None:
    with pytest.raises(FlagError, match="LOCKSTEP_COLOUR"):
        serve_config(["--model", "m"], {"LOCKSTEP_COLOUR": "red"})


def test_refusals_are_one_line_and_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "m", "--tp", "x"]) == ExitCode.CONFIG
    assert main(["--model", "no such folder", *_CPU]) == ExitCode.CHECKPOINT
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "--tp" in line and "'x'" in line]
    assert [line for line in lines if "no such folder" in line]


def test_every_daemon_flag_is_known_to_serve() -> None:
    """Read from the sources: this package imports no daemon."""
    root = Path(__file__).parents[3]
    from_serve = (root / "lockstep" / "serve.py").read_text(encoding="utf-8")
    for daemon in ("coordinator", "worker"):
        source = (root / daemon / "config.py").read_text(encoding="utf-8")
        table = source[source.index("FLAGS = (") : source.index("@dataclass")]
        names = [part.split('"')[1] for part in table.split("Flag(")[1:]]
        assert len(names) > 5
        for name in set(names) - {"workers", "device"}:
            assert f'Flag("{name}"' in from_serve, f"--{name} of the {daemon}"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tls-cert", "c.pem", "--tls-key", "k.pem"], "--tls-cert"),
        (["--api-keys", "keys"], "--api-keys"),
    ],
)
def test_a_gateway_before_a_guarded_port_is_refused(
    tmp_path: Path, flags: list[str], named: str
) -> None:
    words = ["--model", str(tmp_path), "--devices", "cpu", "--http", "127.0.0.1:0", *flags]
    with pytest.raises(ConfigError, match=f"--http with {named}"):
        group_spec(serve_config(words, {}), tmp_path, {})
