"""The `lockstep` command: finds the subcommand and hands it the rest."""

import importlib
import os
import sys
from collections.abc import Sequence

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.version import __version__

# Subcommand -> (module with main(argv) -> exit code, what it does). Imported only when called.
_COMMANDS = {
    "serve": ("lockstep.serve", "serve a model: coordinator and workers on this host"),
    "simulate": ("lockstep.simulate", "serve a model without computing it: for load tests"),
    "workers": ("lockstep.workers", "run the workers of this host for a coordinator elsewhere"),
    "health": ("lockstep.health", "ask a server whether it lives or is ready"),
    "status": ("lockstep.status", "how a server is: ranks, load, memory, last errors"),
    "drain": ("lockstep.drain", "stop a server of this host once its requests have ended"),
    "api-key": ("lockstep.api_key", "make an API key and its line for --api-keys"),
    "generate": ("lockstep.generate", "send one prompt to a server"),
    "chat": ("lockstep.chat", "talk to a server"),
    "demo": ("lockstep.demo", "a small real model on two ranks answers a question"),
    "replay": ("lockstep.replay", "run a step log again and compare: wrong token, hang, slow step"),
    "doctor": ("lockstep.doctor", "what this host has, what will be used, what is missing"),
    "bench": ("bench.__main__", "benchmarks"),
}
_DAEMONS = {
    "coordinator": "run the coordinator daemon alone",
    "worker": "run one worker daemon alone",
}
# What a shell reports of a command that SIGPIPE ended.
_NO_READER = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has seen enough. The interpreter flushes what is left: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    return code


def _run(words: Sequence[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("", [])
    if name in ("--version", "-V"):
        print(f"lockstep {__version__}")
        return ExitCode.CLEAN
    if name in ("", "help", "--help", "-h"):
        print(usage())
        return ExitCode.CLEAN if name else ExitCode.CONFIG
    if name in _DAEMONS:
        importlib.import_module("lockstep.daemon_process").exec_daemon(name, rest)
    if name not in _COMMANDS:
        print(f"lockstep: no command {name!r}\n{usage()}", file=sys.stderr)
        return ExitCode.CONFIG
    return int(importlib.import_module(_COMMANDS[name][0]).main(rest))


def usage() -> str:
    """The commands, one a line."""
    helps = {name: text for name, (_, text) in _COMMANDS.items()} | _DAEMONS
    lines = [f"  {name:<12} {text}" for name, text in helps.items()]
    return "\n".join(
        ["usage: lockstep COMMAND ... (each has --help), or lockstep --version", *lines]
    )


if __name__ == "__main__":
    sys.exit(main())
