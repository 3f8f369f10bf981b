"""`lockstep doctor --bundle FILE`: what is needed to find out what is wrong, in one archive.

Versions, settings, log tails, metrics, what the server says of itself, the last stall. Every text
passes a Redactor; nothing of a request is read (a step log, which holds token ids, is left out).
What could not be had is named in notes.txt with the reason.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.client import CallFailed, Client, ClientConfig, ServerInfo
from lockstep.daemon.version import __version__
from lockstep.redact import Redactor
from lockstep.status import as_json, render

FOLDER = "lockstep-bundle"
_TAIL_BYTES = 1 << 20
_LIMIT_S = 10.0
_JOURNAL = ("journalctl", "--unit=lockstep-*", "--lines=5000", "--no-pager", "--output=short-iso")
# What steers the daemons and what they use; other variables of a process are nobody's business.
_VARIABLES = ("LOCKSTEP_", "CUDA_", "NCCL_", "NVIDIA_", "OMP_", "OTEL_", "GLOO_", "GRPC_")


@dataclass
class Bundle:
    """The archive's files by name, cleaned as they are added, and what is missing in it."""

    redactor: Redactor
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """Adds a file."""
        self.files[name] = self.redactor.clean(text)

    def miss(self, what: str, why: object) -> None:
        """Notes what could not be had."""
        self.notes.append(self.redactor.clean(f"{what}: {why}"))

    def write(self, path: Path) -> None:
        """Writes the .tar.gz, readable by its owner alone. Raises OSError."""
        files = self.files | {"notes.txt": "\n".join([*self.notes, ""])}
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
            for name, text in sorted(files.items()):
                content = text.encode()
                entry = tarfile.TarInfo(f"{FOLDER}/{name}")
                entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(content))


@dataclass(frozen=True)
class Sources:
    """Where to look. `metrics` empty: the daemons' default ports; `logs` beside the journal.

    `client`: TLS and API key for the server at `address`.
    """

    address: str
    client: ClientConfig
    metrics: Sequence[str]
    logs: Sequence[Path]
    configs: Sequence[Path]


def collect(sources: Sources, report: str, environ: Mapping[str, str]) -> Bundle:
    """Everything that can be had. `report` is the doctor's own. Nothing here hangs or raises for
    what is missing."""
    bundle = Bundle(Redactor())
    bundle.redactor.learn(environ)
    _add_settings(bundle, sources.configs, environ)
    server = _add_server(bundle, sources.address, sources.client)
    if server is not None:
        _add_processes(bundle, server)
        _add_stall(bundle, server)
    bundle.add("doctor.txt", report)
    bundle.add("versions.txt", "\n".join(_versions()) + "\n")
    for address in sources.metrics or _metrics_addresses(server):
        _add_metrics(bundle, address)
    _add_logs(bundle, sources.logs)
    return bundle


def _versions() -> Iterator[str]:
    yield f"lockstep {__version__}"
    found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    yield from (f"{name} {found[name]}" for name in sorted(found, key=str.lower))


def _add_settings(bundle: Bundle, configs: Sequence[Path], environ: Mapping[str, str]) -> None:
    texts = {}
    for path in configs:
        try:
            texts[path.name] = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            bundle.miss(f"settings {path}", error.strerror)
    for text in texts.values():
        pairs = (line.partition("=") for line in text.splitlines())
        bundle.redactor.learn({n.strip(): v.strip().strip("\"'") for n, _, v in pairs})
    for name, text in texts.items():
        bundle.add(f"settings/{name}", text)
    bundle.add("settings/environment.txt", _variables(environ))


def _variables(environ: Mapping[str, str]) -> str:
    chosen = {name: value for name, value in environ.items() if name.startswith(_VARIABLES)}
    return "".join(f"{name}={value}\n" for name, value in sorted(chosen.items()))


def _add_server(bundle: Bundle, address: str, config: ClientConfig) -> ServerInfo | None:
    try:
        with Client(address, config) as client:
            server, model = client.server_info(), client.model_info()
    except CallFailed as error:
        bundle.miss(f"server {address}", error)
        return None
    bundle.add("server.json", as_json(server, model))
    bundle.add("server.txt", render(address, server, model) + "\n")
    return server


def _add_processes(bundle: Bundle, server: ServerInfo) -> None:
    """Command line, settings and memory of the daemons that run on this host."""
    here = {rank.pid: f"rank {rank.rank}" for rank in server.ranks if rank.host == _host()}
    for pid, name in {server.pid: "coordinator", **here}.items():
        folder = Path(f"/proc/{pid}")
        try:
            words, variables, status = (
                (folder / file).read_text(encoding="utf-8", errors="replace")
                for file in ("cmdline", "environ", "status")
            )
        except OSError as error:
            bundle.miss(f"process {pid}, {name}", error.strerror)
            continue
        pairs = dict(pair.partition("=")[::2] for pair in variables.split("\0") if pair)
        bundle.redactor.learn(pairs)
        text = f"{words.replace(chr(0), ' ')}\n\n{_variables(pairs)}\n{status}"
        bundle.add(f"processes/{name.replace(' ', '-')}.txt", text)


def _add_stall(bundle: Bundle, server: ServerInfo) -> None:
    """The ranks' last collectives when the group was lost, as the coordinator kept them."""
    if server.last_stall:
        bundle.add("stall.txt", server.last_stall + "\n")
    else:
        bundle.miss("stall", "the group was not lost by a stall")


def _metrics_addresses(server: ServerInfo | None) -> list[str]:
    """The default ports: 9851, and 9860 + rank at each rank's host."""
    ranks = server.ranks if server is not None else ()
    workers = [f"{each.address.rpartition(':')[0]}:{9860 + each.rank}" for each in ranks]
    return ["127.0.0.1:9851", *workers]


def _add_metrics(bundle: Bundle, address: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/metrics", timeout=_LIMIT_S) as response:
            text = response.read().decode("utf-8", errors="replace")
    except (OSError, ValueError) as error:
        bundle.miss(f"metrics of {address}", error)
        return
    bundle.add(f"metrics/{address.replace(':', '-')}.txt", text)


def _add_logs(bundle: Bundle, logs: Sequence[Path]) -> None:
    for number, path in enumerate(logs):
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
        except OSError as error:
            bundle.miss(f"log {path}", error.strerror)
            continue
        bundle.add(f"logs/{number}-{path.name}", text)
    try:
        found = subprocess.run(
            _JOURNAL,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        bundle.miss("journal", error)
        return
    bundle.add("logs/journal.txt", found.stdout[-_TAIL_BYTES:].decode("utf-8", errors="replace"))


def _host() -> str:
    return socket.gethostname()
