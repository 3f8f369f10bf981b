"""`lockstep generate` against a scripted server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lockstep import generate
from lockstep.daemon.exit_codes import ExitCode
from tests.helpers.scripted_server import (
    TEXT,
    ScriptedServer,
    breaks_after,
    fails,
    mixed_samples,
    serving,
)


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def address(server: ScriptedServer) -> Iterator[str]:
    with serving(server) as address:
        yield address


def test_text_is_printed_and_summed_up(
    server: ScriptedServer, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--address", address, "--prompt", "x", "--top-k", "5", "--verbose"]
    assert generate.main(words) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{TEXT}\n"
    assert "seed 7: 3 prompt + 3 output tokens, ended by length" in shown.err
    assert server.requests[0].sampling_params.top_k == 5
    assert not server.requests[0].sampling_params.HasField("top_p")


def test_ids_are_printed_when_asked(
    server: ScriptedServer, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--address", address, "--token-ids", "1,2", "--ids"]) == 0
    assert capsys.readouterr().out.split() == ["4", "5", "6"]
    assert list(server.requests[0].token_ids.ids) == [1, 2]


def test_a_failed_call_says_why_and_exits_1(
    server: ScriptedServer, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plant(breaks_after(1))
    assert generate.main(["--address", address, "--prompt", "x", "--times"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "Hi "
    assert "\nlockstep generate: UNAVAILABLE: rank 1 lost at step 5" in shown.err
    assert "queue-ms 1.500" in shown.err


def test_retries_and_resume_are_as_asked(
    server: ScriptedServer, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    away = fails(grpc.StatusCode.UNAVAILABLE, "not ready")
    words = ["--address", address, "--prompt", "x"]
    server.plant(away)
    assert generate.main(words) == 1
    server.plant(away, breaks_after(2))
    assert generate.main([*words, "--retries", "2", "--resume"]) == 0
    assert capsys.readouterr().out == f"{TEXT}\n"
    assert list(server.requests[-1].resume_output_ids) == [4, 5]


def test_samples_and_times_are_printed_when_asked(
    server: ScriptedServer, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plant(mixed_samples)
    words = ["--address", address, "--prompt", "x", "--n", "2", "--times", "--verbose"]
    assert generate.main(words) == 0
    shown = capsys.readouterr()
    assert shown.out == "--- 0\nI am number \n--- 1\nI am number \n"
    assert shown.err.startswith("queue-ms 1.500\n")
    assert "4 output tokens" in shown.err


def test_request_fields_are_sent_when_given(server: ScriptedServer, address: str) -> None:
    words = ["--address", address, "--prompt", "x"]
    assert generate.main(words) == 0
    given = [*words, "--priority", "-3", "--tenant", "acme", "--no-prefix-cache"]
    assert generate.main(given) == 0
    plain, telling = server.requests
    assert not plain.HasField("use_prefix_cache") and not plain.tenant and not plain.priority
    assert (telling.priority, telling.tenant) == (-3, "acme")
    assert telling.HasField("use_prefix_cache") and not telling.use_prefix_cache


def test_the_api_key_comes_from_a_file_or_the_environment(
    server: ScriptedServer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKSTEP_API_KEY", "of-the-environment")
    words = ["--address", address, "--prompt", "x"]
    assert generate.main(words) == 0
    (tmp_path / "key").write_text("of-the-file\n")
    assert generate.main([*words, "--api-key-file", str(tmp_path / "key")]) == 0
    keys = [metadata["authorization"] for metadata in server.metadata]
    assert keys == ["Bearer of-the-environment", "Bearer of-the-file"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--api-key-file", "/no/such/key"], "/no/such/key"),
        (["--tls-ca", "/no/such/ca.pem"], "cannot read /no/such/ca.pem"),
        (["--tls-cert", "cert.pem"], "cert is given without key"),
        (["--retries", "-1"], "--retries is -1"),
        (["--timeout", "0"], "timeout_s is 0.0"),
        (["--resume", "--n", "2"], "--resume is of one output"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_settings_are_named_before_anything_is_sent(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--prompt", "x", *words]) == ExitCode.CONFIG
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max-tokens", "--n", "--top-k", "--priority", "--token-ids"])
def test_a_number_that_no_message_can_hold_is_refused(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if flag == "--token-ids" else ["--prompt", "x"]
    with pytest.raises(SystemExit) as ended:
        generate.main([*prompt, flag, str(2**31)])
    assert ended.value.code == ExitCode.CONFIG
    assert f"argument {flag}: " in capsys.readouterr().err
