"""Settings of a simulated worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.daemon.flags import (
    Flag,
    FlagError,
    choice,
    float_between,
    int_at_least,
    parse_flags,
    positive_int,
)
from lockstep.daemon.security_flags import ALLOW_PLAINTEXT, GROUP_FLAGS
from worker.config import COORDINATOR_FLAGS, check_group_settings
from worker.config import FLAGS as WORKER_FLAGS

_SHARED = (
    *("model", "host", "port", "metrics-host", "metrics-port", "ready-file", "log-format"),
    *(flag.name for flag in GROUP_FLAGS),
    ALLOW_PLAINTEXT.name,
)
SIMULATION_FLAGS = (
    Flag(
        "step-ms",
        float_between(0.0, 60_000.0),
        2.0,
        "milliseconds of an empty step",
    ),
    Flag("row-us", float_between(0.0, 1e6), 0.0, "microseconds added for each row"),
    Flag("prefill-us", float_between(0.0, 1e6), 10.0, "microseconds added for each prompt token"),
    Flag("jitter", float_between(0.0, 1.0), 0.0, "share by which a step's time varies"),
    Flag("seed", int_at_least(0), 0, "changes all tokens and the jitter"),
    Flag("num-blocks", int_at_least(2), 65536, "KV blocks, the dummy included"),
    Flag("vocab-size", positive_int, None, "token ids; default: from config.json"),
    Flag("stop-probability", float_between(0.0, 1.0), 0.0, "chance of a stop id, per token"),
    Flag(
        "token-text",
        choice("any", "ascii", "multibyte", "clock"),
        "any",
        "ids to choose from: all, those of ASCII text, half of them beyond ASCII; clock: the"
        " milliseconds of CLOCK_MONOTONIC when the step ended, modulo the vocabulary",
    ),
)


@dataclass(frozen=True)
class SimulatedConfig:
    """Settings of one simulated worker process; all ranks of a group need the same."""

    model: Path
    host: str
    port: int
    metrics_host: str
    metrics_port: int
    ready_file: str
    log_format: str
    step_ms: float
    row_us: float
    prefill_us: float
    jitter: float
    seed: int
    num_blocks: int
    vocab_size: int | None
    stop_probability: float
    token_text: str
    group_cert: str = ""
    group_key: str = ""
    group_ca: str = ""
    group_secret: str = ""
    allow_plaintext: bool = False

    def __post_init__(self) -> None:
        check_group_settings(self)
        if not self.model:
            raise FlagError("--model is missing; it wants a folder with config.json")


def simulated_config(argv: Sequence[str], environ: Mapping[str, str]) -> SimulatedConfig:
    """Reads the settings; raises FlagError."""
    shared = tuple(flag for flag in WORKER_FLAGS if flag.name in _SHARED)
    others = COORDINATOR_FLAGS | {flag.name for flag in WORKER_FLAGS}
    flags = (*shared, *SIMULATION_FLAGS)
    return SimulatedConfig(**parse_flags("worker.simulated", flags, argv, environ, others))
