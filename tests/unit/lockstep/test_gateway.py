"""How the HTTP gateway is started: its flags, its address, and what is refused before."""

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lockstep import gateway, serve
from lockstep.daemon.exit_codes import ExitCode
from lockstep.errors import AddressInUse, ConfigError
from lockstep.gateway import HttpAddress, gateway_spec, http_address, is_ready, require_gateway
from lockstep.serve import group_spec, serve_config

_CPU = ["--devices", "cpu"]
_METRICS = HttpAddress("127.0.0.1", 9852)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    return tmp_path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "require_gateway", lambda: None)


def command_of(model: Path, log_format: str = "text", drain_seconds: float = 30.0) -> list[str]:
    address = HttpAddress("127.0.0.1", 30000)
    spec = gateway_spec(address, model, _METRICS, drain_seconds, log_format, {})
    return list(spec.command("127.0.0.1:50051"))


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("off", None),
        ("on", HttpAddress("127.0.0.1", 30000)),
        ("127.0.0.1:8000", HttpAddress("127.0.0.1", 8000)),
        ("localhost:8000", HttpAddress("127.0.0.1", 8000)),
        ("[::1]:8000", HttpAddress("::1", 8000)),
    ],
)
def test_where_it_serves(text: str, address: HttpAddress | None) -> None:
    assert http_address(text) == address


def test_an_address_is_told_as_it_is_typed() -> None:
    for text in ("127.0.0.1:8000", "[::1]:8000"):
        assert str(http_address(text)) == text


def test_port_0_is_any_free_one() -> None:
    address = http_address("127.0.0.1:0")
    assert address is not None and address.port > 0
    with socket.create_server((address.host, address.port)):
        pass


@pytest.mark.parametrize("text", ["", "8000", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        http_address(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "example.com"])
def test_an_address_that_others_reach_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="loopback"):
        http_address(f"{host}:8000")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_MODULE", "no_such_package")
    with pytest.raises(ConfigError, match=r"no_such_package.*lockstep\[http\]"):
        require_gateway()


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer.json"):
        command_of(tmp_path)


def test_both_its_listeners_are_told_their_host(model: Path) -> None:
    command = command_of(model)
    assert value_of(command, "--host") == value_of(command, "--prometheus-host") == "127.0.0.1"
    assert (value_of(command, "--port"), value_of(command, "--prometheus-port")) == (
        "30000",
        "9852",
    )
    assert value_of(command, "--worker-urls") == "grpc://127.0.0.1:50051"


def test_it_never_leaves_the_one_server_out_of_routing(model: Path) -> None:
    command = command_of(model)
    assert "--disable-circuit-breaker" in command
    assert "--disable-worker-overload-protection" in command
    assert int(value_of(command, "--worker-wedge-secs")) > 3600


def test_it_gets_the_drain_time_and_no_model_hub(model: Path) -> None:
    assert value_of(command_of(model, drain_seconds=4.2), "--shutdown-grace-period-secs") == "5"
    address = HttpAddress("127.0.0.1", 30000)
    spec = gateway_spec(address, model, _METRICS, 4.0, "text", {"HOME": "/h"})
    assert spec.environ["HOME"] == "/h"
    assert spec.environ["HF_ENDPOINT"].startswith("http://127.0.0.1:")
    assert spec.stop_timeout_s > 4.0


def test_log_format_is_passed_on(model: Path) -> None:
    assert "--log-json" in command_of(model, "json")
    assert "--log-json" not in command_of(model)


@pytest.mark.parametrize(
    ("file", "template", "flags"),
    [
        ("chat_template.jinja", "{{ messages }}", []),
        ("chat_template.jinja", "<tool_call>", ["--tool-call-parser", "qwen"]),
        ("tokenizer_config.json", "[TOOL_CALLS]", ["--tool-call-parser", "mistral"]),
        ("tokenizer_config.json", "<|python_tag|>", ["--tool-call-parser", "llama"]),
        (
            "tokenizer_config.json",
            "<tool_call> {% if enable_thinking %}",
            ["--tool-call-parser", "qwen", "--reasoning-parser", "qwen3"],
        ),
    ],
)
def test_parsers_suit_the_chat_template(
    model: Path, file: str, template: str, flags: list[str]
) -> None:
    text = template if file.endswith("jinja") else json.dumps({"chat_template": template})
    (model / file).write_text(text, encoding="utf-8")
    plain = command_of_plain(model)
    command = command_of(model)
    assert command[len(plain) :] == flags


def command_of_plain(model: Path) -> list[str]:
    """The command without what the template adds, which comes last."""
    command = command_of(model)
    parsers = [command.index(word) for word in command if word.endswith("-parser")]
    return command[: min(parsers, default=len(command))]


@contextmanager
def answering(status: int) -> Iterator[HttpAddress]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readiness" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield HttpAddress("127.0.0.1", server.server_port)
        finally:
            server.shutdown()
            thread.join(10)


def test_ready_is_what_readiness_says() -> None:
    with answering(200) as address:
        assert is_ready(address)
    with answering(503) as address:
        assert not is_ready(address)
    assert not is_ready(address)  # nobody listens any more


@pytest.mark.usefixtures("installed")
def test_serve_puts_one_before_the_group_only_if_told(model: Path) -> None:
    words = ["--model", str(model), *_CPU]
    assert group_spec(serve_config(words, {}), model, {}).gateway is None
    config = serve_config([*words, "--http", "127.0.0.1:0"], {})
    assert config.http is not None
    spec = group_spec(config, model, {}).gateway
    assert spec is not None and spec.address == config.http
    command = list(spec.command("h:1"))
    assert value_of(command, "--prometheus-port") == "9852"
    bare = serve_config([*words, "--http"], {})
    assert str(bare.http) == "127.0.0.1:30000"


@pytest.mark.usefixtures("installed")
def test_metrics_port_0_gives_it_any_free_one(model: Path) -> None:
    config = serve_config(
        ["--model", str(model), *_CPU, "--http", "127.0.0.1:0", "--metrics-port", "0"], {}
    )
    spec = group_spec(config, model, {}).gateway
    assert spec is not None
    assert int(value_of(list(spec.command("h:1")), "--prometheus-port")) > 0


@pytest.mark.usefixtures("installed")
def test_an_address_in_use_is_named_before_anything_starts(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = serve_config(["--model", str(model), *_CPU, "--http", address], {})
        with pytest.raises(AddressInUse, match=f"{address}.*in use.*--http"):
            group_spec(config, model, {})
        words = ["--model", str(model), *_CPU, "--http", address]
        assert serve.main(words) == ExitCode.ADDRESS
    assert address in capsys.readouterr().err
