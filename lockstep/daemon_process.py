"""How this package's daemons are started: command, environment, and becoming one."""

import os
import site
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# gRPC's older event loop: a first token comes 0.2 ms sooner and the engine takes a tenth less CPU
# than with the threads of the newer one (docs/performance.md). Read when grpc is imported.
GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"


def daemon_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without our settings, and with this package's folder to import from."""
    result = {name: value for name, value in environ.items() if not name.startswith("LOCKSTEP_")}
    # gRPC's core writes a line for every handshake that fails, and anybody can make one fail.
    result.setdefault("GRPC_VERBOSITY", "ERROR")
    result.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)
    root = str(Path(__file__).resolve().parent.parent)
    if root not in [*site.getsitepackages(), site.getusersitepackages()]:
        others = result.get("PYTHONPATH")
        result["PYTHONPATH"] = root if not others else f"{root}{os.pathsep}{others}"
    return result


def python_module(name: str) -> list[str]:
    """The command that runs one of our packages."""
    # -P: a folder called `worker` where the user happens to stand is not ours.
    return [sys.executable, "-P", "-m", name]


def exec_daemon(module: str, argv: Sequence[str]) -> None:
    """Becomes that daemon (`lockstep worker ...`, `lockstep coordinator ...`). Does not return."""
    command = [*python_module(module), *argv]
    environ = daemon_environ(os.environ)
    environ |= {name: value for name, value in os.environ.items() if name.startswith("LOCKSTEP_")}
    os.execve(sys.executable, command, environ)
