"""`lockstep simulate`: the real coordinator over simulated workers, supervised as `serve` does it.

The workers compute nothing: their steps take the time that the flags say and their tokens come from
a pure function, so that the control plane can be measured, tested and sized without the model.
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import Flag, FlagError, parse_flags
from lockstep.daemon_process import python_module
from lockstep.errors import AddressInUse, ConfigError
from lockstep.serve import (
    COORDINATOR_FLAGS,
    OWN_FLAGS,
    ServeConfig,
    group_spec,
    report,
    run_group,
    serve_config,
)
from lockstep.supervisor import GroupSpec

# The workers' own: passed on as they are, checked and given their defaults there.
_WORKER_FLAGS = (
    Flag("step-ms", str, None, "milliseconds of an empty step (default: 2)"),
    Flag("row-us", str, None, "microseconds added for each row (default: 0)"),
    Flag("prefill-us", str, None, "microseconds added for each prompt token (default: 10)"),
    Flag("jitter", str, None, "share by which a step's time varies (default: 0)"),
    Flag("seed", str, None, "changes all tokens and the jitter (default: 0)"),
    Flag("num-blocks", str, None, "KV blocks, the dummy included (default: 65536)"),
    Flag("vocab-size", str, None, "token ids; default: from config.json"),
    Flag("stop-probability", str, None, "chance of a stop id, per token (default: 0)"),
    Flag("token-text", str, None, "any, ascii, multibyte or clock (default: any)"),
)
# Settings of `serve` that mean nothing without a model.
_NOT_HERE = frozenset({"devices", "num-threads", "nccl-path", "load-format", "comm", "use-graphs"})


def main(argv: Sequence[str]) -> int:
    """Serves until told to stop; returns the exit code."""
    started = time.monotonic()
    try:
        config, worker_flags = simulate_config(argv, os.environ)
        config = config.with_secret()
        group = simulated_group(config, worker_flags, os.environ)
    except (FlagError, ConfigError) as error:
        _report(str(error))
        return ExitCode.CONFIG
    except AddressInUse as error:
        _report(str(error))
        return ExitCode.ADDRESS
    return run_group(config, group, started, _report)


def simulate_config(
    argv: Sequence[str], environ: Mapping[str, str]
) -> tuple[ServeConfig, tuple[str, ...]]:
    """The settings, and the workers' flags as words. Raises FlagError, ConfigError."""
    shared = tuple(f for f in (*OWN_FLAGS, *COORDINATOR_FLAGS) if f.name not in _NOT_HERE)
    # Once as text, to tell the workers' flags from the others, which `serve_config` then checks.
    texts = tuple(dataclasses.replace(flag, parse=str, default=None) for flag in shared)
    values = parse_flags(
        "lockstep simulate", (*texts, *_WORKER_FLAGS), argv, environ, _NOT_HERE | {"workers"}
    )
    if not Path(values["model"] or "").is_dir():
        raise ConfigError(f"--model is {values['model']!r}; it wants a folder with config.json")
    worker_flags = _words(_WORKER_FLAGS, values)
    return serve_config([*_words(texts, values), "--devices", "cpu"], {}), worker_flags


def simulated_group(
    config: ServeConfig, worker_flags: Sequence[str], environ: Mapping[str, str]
) -> GroupSpec:
    """The group of `serve` with other workers."""

    def worker_command(rank: int, port: int, metrics_port: int, ready_file: str) -> Sequence[str]:
        return [
            *python_module("worker.simulated"),
            *("--model", config.model, "--port", str(port), "--metrics-port", str(metrics_port)),
            *("--metrics-host", config.metrics_host),
            *("--ready-file", ready_file, "--log-format", config.log_format),
            *config.group_words,
            *worker_flags,
        ]

    group = group_spec(config, Path(config.model), environ)
    return dataclasses.replace(group, worker_command=worker_command)


def _words(flags: Sequence[Flag], values: Mapping[str, str | None]) -> tuple[str, ...]:
    given = ((f"--{flag.name}", values[flag.dest]) for flag in flags)
    return tuple(word for name, value in given if value is not None for word in (name, value))


def _report(line: str) -> None:
    report("simulate", line)
