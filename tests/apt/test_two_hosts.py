"""Two hosts, one rank each, tensors over the network between them, and a cable that is cut."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lockstep.errors import CallFailed
from tests.helpers.message_client import Client, chat_request, ids_request
from tests.helpers.network_hosts import ADDRESSES, PUBLIC, NetworkHosts
from tests.helpers.served_group import serve_environ
from tests.integration.chaos_support import running_streams, wait_until

pytestmark = [pytest.mark.apt, pytest.mark.timeout(300)]

STEP_TIMEOUT_S = 3.0
START_LIMIT_S = 100.0
# After the cut: the time-out of a step, two seconds for Quiesce, and some for two busy cores.
NOTICE_LIMIT_S = STEP_TIMEOUT_S + 2.0 + 5.0
# After the cable is back: what ends of the old epoch, Hello, and the weights once more.
RECOVERY_LIMIT_S = 60.0
CALL_LIMIT_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


class Daemon:
    """A `lockstep COMMAND ...` on one of the hosts, with its output in a file."""

    def __init__(self, hosts: NetworkHosts, host: int, folder: Path, words: Sequence[str]) -> None:
        folder.mkdir()
        self._log = folder / "log"
        command = hosts.command(host, [sys.executable, "-P", "-m", "lockstep", *words])
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=serve_environ(folder) | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log_text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """Kills everything of its process namespace: its first process is the namespace's."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(20)


class Group:
    """A coordinator on host 0 and `lockstep workers` on both."""

    def __init__(self, hosts: NetworkHosts, model: Path, folder: Path) -> None:
        self.ready_file = folder / "ready.json"
        workers = ["workers", "--model", str(model), "--devices", "cpu", "--num-threads", "1"]
        coordinator = ["coordinator", "--model", str(model), "--dtype", "float32"]
        coordinator += ["--workers", ",".join(f"{address}:50100" for address in ADDRESSES)]
        coordinator += ["--host", PUBLIC, "--comm", "gloo", "--max-model-len", "1024"]
        coordinator += ["--step-timeout", str(STEP_TIMEOUT_S), "--kv-cache-bytes", "64M"]
        coordinator += ["--ready-file", str(self.ready_file)]
        # The wire between the namespaces is nobody else's.
        private = ["--allow-plaintext", "on"]
        commands = [(host, [*workers, "--host", ADDRESSES[host], *private]) for host in range(2)]
        self.daemons: list[Daemon] = []
        for number, (host, words) in enumerate([*commands, (0, [*coordinator, *private])]):
            self.daemons.append(Daemon(hosts, host, folder / str(number), words))
        wait_until(self.ready_file.exists, START_LIMIT_S, self.log_text)
        self.address = str(json.loads(self.ready_file.read_text(encoding="utf-8"))["grpc"])

    def log_text(self) -> str:
        return "\n".join(daemon.log_text() for daemon in self.daemons)

    def close(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.close()


@pytest.fixture
def hosts() -> Iterator[NetworkHosts]:
    with NetworkHosts() as made:
        yield made


@pytest.fixture
def group(hosts: NetworkHosts, smollm2_dir: Path, tmp_path: Path) -> Iterator[Group]:
    started = Group(hosts, smollm2_dir, tmp_path)
    yield started
    started.close()


def capital_of_france(client: Client) -> str:
    question = "What is the capital of France? Answer in one sentence."
    request = chat_request([{"role": "user", "content": question}], temperature=0.0, max_tokens=16)
    return client.generate_unary(request, timeout_s=CALL_LIMIT_S).output.text


def cut_under_way(hosts: NetworkHosts, group: Group) -> None:
    """Cuts the cable under two streams: both end in time, by an error that names the lost rank."""
    with running_streams(group.address, 2, max_tokens=900) as streams:
        hosts.cut()
        cut_at = time.monotonic()
        ends = streams.ends(NOTICE_LIMIT_S)
    for end in ends:
        assert end.error is not None and end.error.code == "UNAVAILABLE"
        assert "rank " in str(end.error) and "lost at step" in str(end.error)
        assert end.ended_at - cut_at < NOTICE_LIMIT_S


def wait_recovered(client: Client, group: Group, epoch: int) -> None:
    def is_back() -> bool:
        now = client.server_info()
        return now.is_ready and now.epoch > epoch

    wait_until(is_back, RECOVERY_LIMIT_S, group.log_text)


def test_two_hosts_answer_as_one_and_recover_from_a_cut_cable(
    hosts: NetworkHosts, group: Group
) -> None:
    with Client(group.address) as client:
        before = capital_of_france(client)
        assert "Paris" in before
        server = client.server_info()
        assert [rank.address for rank in server.ranks] == [f"{a}:50100" for a in ADDRESSES]
        assert all(rank.all_reduce_count > 0 for rank in server.ranks)

        # Back at once: the other worker still hears that its epoch is over.
        cut_under_way(hosts, group)
        hosts.heal()
        wait_recovered(client, group, server.epoch)
        assert capital_of_france(client) == before

        # Back only when the coordinator dials for the next epoch: that worker knows of nothing.
        epoch = client.server_info().epoch
        cut_under_way(hosts, group)
        wait_until(
            lambda: client.server_info().cause.startswith("starting, phase hello"),
            NOTICE_LIMIT_S,
            group.log_text,
        )
        with pytest.raises(CallFailed, match="lost at step") as refused:
            request = ids_request([3], temperature=0.0, max_tokens=1)
            client.generate_unary(request, timeout_s=CALL_LIMIT_S)
        assert refused.value.code == "UNAVAILABLE"
        hosts.heal()
        wait_recovered(client, group, epoch)
        assert capital_of_france(client) == before
