"""Small programs that stand in for the daemons, and a supervisor over them in its own process."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT_S = 60.0
_POLL_S = 0.02

# argv: name, port, metrics port, ready file, journal, what to do once ready.
_DAEMON = """
import json, os, signal, sys, time
name, port, metrics_port, ready_file, journal, script = sys.argv[1:]

def note(**what):
    line = json.dumps({"name": name, "pid": os.getpid(), "port": int(port),
                       "metrics_port": int(metrics_port), **what})
    with open(journal, "a") as file:
        file.write(line + "\\n")

def ready(port_now):
    with open(ready_file + ".part", "w") as file:
        grpc = f"127.0.0.1:{port_now}"
        json.dump({"pid": os.getpid(), "grpc": grpc, "metrics": "127.0.0.1:1"}, file)
    os.rename(ready_file + ".part", ready_file)

def stop(signum, frame):
    note(event="SIGTERM")
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
exec(script)
"""

SERVES = "note(event='start'); ready(int(port) or 40000 + os.getpid() % 10000); time.sleep(600)"

# argv: JSON of what `supervised` was given.
_SUPERVISOR = """
import json, os, sys
from lockstep.gateway import GatewaySpec, HttpAddress
from lockstep.processes import supervised_processes
from lockstep.supervisor import GroupSpec, Supervisor

given = json.loads(sys.argv[1])
daemon = given["daemon"]

def worker(rank, port, metrics_port, ready_file):
    scripts = given["workers"]
    return [sys.executable, "-c", daemon, f"worker {rank}", str(port), str(metrics_port),
            ready_file, given["journal"], scripts[min(rank, len(scripts) - 1)]]

def coordinator(addresses, port, metrics_port, ready_file):
    return [sys.executable, "-c", daemon, "coordinator " + ",".join(addresses), str(port),
            str(metrics_port), ready_file, given["journal"], given["coordinator"]]

def gateway_command(grpc):
    return [sys.executable, "-c", daemon, "gateway " + grpc, "0", "0", given["gateway_ready"],
            given["journal"], given["gateway"]]

gateway = None
if given["gateway"]:
    gateway = GatewaySpec(
        address=HttpAddress("127.0.0.1", 1), command=gateway_command,
        is_ready=lambda: os.path.exists(given["gateway_ready"]),
        environ={"PATH": "/usr/bin:/bin", "TMPDIR": given["tmp"]},
        start_timeout_s=given["gateway_timeout_s"], stop_timeout_s=20.0,
    )
group = GroupSpec(
    num_ranks=given["num_ranks"], worker_command=worker, coordinator_command=coordinator,
    coordinator_ports=(0, 0), environ={"PATH": "/usr/bin:/bin", "TMPDIR": given["tmp"]},
    worker_metrics_port=lambda rank: 9860 + rank,
    restarts=given["restarts"], drain_timeout_s=given["drain_timeout_s"],
    worker_stop_timeout_s=2.0, worker_start_timeout_s=20.0, gateway=gateway,
)
def say(line):
    print(line, file=sys.stderr, flush=True)
with supervised_processes() as processes:
    code = Supervisor(group, processes, say, lambda r: print(r.pid, flush=True)).run()
sys.exit(code)
"""


class Supervised:
    """A running supervisor and what its daemons have written down."""

    def __init__(self, process: subprocess.Popen[str], journal: Path, tmp: Path) -> None:
        self.process = process
        self.tmp = tmp
        self._journal = journal
        self._said = ""

    def notes(self, event: str = "start") -> list[dict[str, Any]]:
        """What daemons noted so far, oldest first."""
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        return [note for note in map(json.loads, lines) if note["event"] == event]

    def wait_notes(self, name: str, count: int, event: str = "start") -> list[dict[str, Any]]:
        """Waits until the daemon whose name begins with `name` has noted `event` so often."""
        deadline = time.monotonic() + WAIT_S
        while True:
            found = [note for note in self.notes(event) if note["name"].startswith(name)]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"{name}: {len(found)} of {count} {event}"
            assert self.process.poll() is None, f"supervisor ended with {self.process.returncode}"
            time.sleep(_POLL_S)

    def wait_ready(self) -> int:
        """Waits for the group to be ready; the coordinator's pid."""
        assert self.process.stdout is not None
        output = self.process.stdout.fileno()
        # Read past the stream, which could hold a second line that select does not see.
        while "\n" not in self._said:
            assert select.select([output], [], [], WAIT_S)[0], "never ready"
            said = os.read(output, 4096).decode()
            assert said, f"ended before it was ready: {self.wait_exit()}"
            self._said += said
        pid, _, self._said = self._said.partition("\n")
        return int(pid)

    def wait_exit(self) -> tuple[int, str]:
        """Waits for the supervisor's end: exit code and standard error."""
        _, errors = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, errors

    def assert_nothing_left(self) -> None:
        """No daemon runs, and no file of ours is in the temporary folder."""
        for note in self.notes():
            wait_ended(note["pid"])
        assert list(self.tmp.iterdir()) == []


@contextmanager
def supervised(
    folder: Path,
    *,
    workers: list[str] | None = None,
    coordinator: str = SERVES,
    num_ranks: int = 2,
    restarts: bool = True,
    drain_timeout_s: float = 20.0,
    gateway: str = "",
    gateway_timeout_s: float = 20.0,
) -> Iterator[Supervised]:
    """Runs a supervisor in a process of its own; kills it at the end of the block."""
    tmp = Path(tempfile.mkdtemp(dir=folder))
    journal = folder / "journal"
    given = {
        "daemon": _DAEMON,
        "workers": workers or [SERVES],
        "coordinator": coordinator,
        "num_ranks": num_ranks,
        "restarts": restarts,
        "drain_timeout_s": drain_timeout_s,
        "gateway": gateway,
        "gateway_timeout_s": gateway_timeout_s,
        "gateway_ready": str(folder / "gateway.ready"),
        "journal": str(journal),
        "tmp": str(tmp),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _SUPERVISOR, json.dumps(given)],
        env={**os.environ, "TMPDIR": str(tmp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Supervised(process, journal, tmp)
    finally:
        process.kill()
        process.communicate(timeout=WAIT_S)


def has_ended(pid: int) -> bool:
    """True for a pid that is gone, or a zombie that its new parent has not yet reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_ended(pid: int) -> None:
    """Waits for a process that is not our child."""
    deadline = time.monotonic() + WAIT_S
    while not has_ended(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(_POLL_S)


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)
