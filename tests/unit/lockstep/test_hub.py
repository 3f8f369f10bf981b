"""Hub ids against a local server that speaks the part of the hub's API that downloads use."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lockstep.errors import HubError
from lockstep.hub import resolve_model

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": b"first half",
    "model-00002-of-00002.safetensors": b"second half",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"raise SystemExit",
    "consolidated.safetensors": b"the same again",
    "original/params.json": b"{}",
    "README.md": b"words",
}


@dataclass
class FakeHub:
    """Models by id, each a mapping of file names to contents; `failing` answers that status."""

    endpoint: str
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    failing: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo_id, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo_id, rest = "/".join(parts[:2]), parts[2:]
        if repo_id in self.hub.failing:
            status, headers = self.hub.failing[repo_id]
            return self.reply(status, b"{}", headers, send_body)
        files = self.hub.models.get(repo_id)
        if files is None:
            headers = {"X-Error-Code": "RepoNotFound"}
            return self.reply(404, b'{"error": "Repository not found"}', headers, send_body)
        if rest[:1] != ["resolve"] and rest[1:] not in ([], ["main"], [COMMIT]):
            headers = {"X-Error-Code": "RevisionNotFound"}
            return self.reply(404, b'{"error": "Invalid rev id"}', headers, send_body)
        if rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": siblings}
            return self.reply(200, json.dumps(answer).encode(), {}, send_body)
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": etag(body)}
                for name, body in files.items()
            ]
            return self.reply(200, json.dumps(tree).encode(), {}, send_body)
        body = files["/".join(rest[2:])]
        if send_body:
            self.hub.fetched.append("/".join(rest[2:]))
        headers = {"ETag": f'"{etag(body)}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, body, headers, send_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], send_body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)


def etag(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = FakeHub(f"http://127.0.0.1:{server.server_port}")
    fake.models = {
        "owner/model": FILES,
        "owner/pickles": {"config.json": b"{}", "pytorch_model.bin": b"a pickle"},
        "owner/no-config": {"model.safetensors": b"x"},
    }
    fake.failing = {
        "owner/gated": (403, {"X-Error-Code": "GatedRepo"}),
        "owner/broken": (500, {}),
    }
    Handler.hub = fake
    thread = threading.Thread(target=server.serve_forever, name="fake-hub")
    thread.start()
    yield fake
    server.shutdown()
    thread.join(30)
    server.server_close()
    assert not thread.is_alive()


def resolve(models: list[str], endpoint: str, home: Path) -> list[str]:
    """resolve_model on each of `models` in one fresh process, whose huggingface_hub has these
    settings from its start. Answers are folders, or "HubError: " and the message."""
    program = (
        "import sys\nfrom lockstep.errors import HubError\nfrom lockstep.hub import resolve_model\n"
        "for model in sys.argv[1:]:\n"
        "    try:\n        print(resolve_model(model))\n"
        "    except HubError as error:\n        print('HubError:', error)\n"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environ |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    finished = subprocess.run(
        [sys.executable, "-c", program, *models],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def test_only_safetensors_json_and_tokenizer_files_are_fetched(
    hub: FakeHub, tmp_path: Path
) -> None:
    home = tmp_path / "hub home"
    first, again = resolve(["owner/model", "owner/model@main"], hub.endpoint, home)
    assert first == again
    wanted = {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert {path.name for path in Path(first).iterdir()} == wanted
    assert all((Path(first) / name).read_bytes() == FILES[name] for name in wanted)
    assert sorted(hub.fetched) == sorted(wanted), "each file once, none of the others"
    # The cache serves when the hub is gone.
    (offline,) = resolve(["owner/model"], "http://127.0.0.1:9", home)
    assert offline == first


def test_what_the_hub_refuses_is_said_in_one_line(hub: FakeHub, tmp_path: Path) -> None:
    cases = {
        "owner/absent": "has no model owner/absent, or it is private",
        "owner/model@nowhere": "owner/model has no revision nowhere",
        "owner/gated": "owner/gated is gated: accept its terms at",
        "owner/broken": "Server error '500 ",
        "owner/pickles": "owner/pickles has no safetensors weights",
        "owner/no-config": "owner/no-config has no config.json",
    }
    answers = resolve(list(cases), hub.endpoint, tmp_path)
    assert len(answers) == len(cases), answers
    for answer, expected in zip(answers, cases.values(), strict=True):
        assert answer.startswith("HubError: ")
        assert expected in answer


def test_an_unreachable_hub_is_named_with_a_way_out(tmp_path: Path) -> None:
    (answer,) = resolve(["owner/model"], "http://127.0.0.1:9", tmp_path)
    assert answer.startswith("HubError: cannot fetch owner/model from http://127.0.0.1:9: ")
    assert "HF_ENDPOINT" in answer


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["", "/nowhere", "./owner/name", "a/b/c", "owner/na me", "name"])
def test_neither_folder_nor_hub_id_is_refused_by_name(model: str) -> None:
    with pytest.raises(HubError, match="no such folder, and not a hub id"):
        resolve_model(model)


def test_a_file_is_refused_even_where_it_looks_like_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    Path("owner/model").write_text("")
    with pytest.raises(HubError, match="no such folder"):
        resolve_model("owner/model")
