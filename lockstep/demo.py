"""`lockstep demo`: a real model, split over ranks, answers one question through gRPC."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lockstep.client import CallFailed, ChatMessage, Client, RankInfo, SamplingParams
from lockstep.daemon.parent_death import die_with_parent
from lockstep.daemon_process import daemon_environ
from lockstep.demo_model import demo_model_dir
from lockstep.devices import count_gpus
from lockstep.errors import ConfigError, DemoModelError
from lockstep.generate import stream_text
from lockstep.ready_record import PendingReady
from lockstep.table import rank_table

QUESTION = "What is the capital of France? Answer in one sentence."
_DEFAULT_RANKS = 2
_MAX_TOKENS = 128
_START_LIMIT_S = 900.0
_ANSWER_LIMIT_S = 300.0
_STOP_LIMIT_S = 60.0
_REST_LIMIT_S = 5.0
_POLL_S = 0.05


def main(argv: Sequence[str]) -> int:
    """Returns 0 when the question was answered; otherwise says which part failed."""
    options = _parser().parse_args(argv)
    try:
        model_dir = demo_model_dir(os.environ, _report)
        devices = _devices(options.tp)
    except (DemoModelError, ConfigError) as error:
        _report(str(error))
        return 1
    with contextlib.closing(PendingReady()) as pending:
        server = _start_server(model_dir, options.tp, devices, pending.path)
        try:
            return _ask_when_ready(server, pending, options.prompt)
        except KeyboardInterrupt:
            return 130
        finally:
            _stop(server)


def _ask_when_ready(server: subprocess.Popen[bytes], pending: PendingReady, prompt: str) -> int:
    deadline = time.monotonic() + _START_LIMIT_S
    while (record := pending.read()) is None:
        if server.poll() is not None:
            _report(f"the server ended with exit code {server.returncode}; its lines above say why")
            return 1
        if time.monotonic() > deadline:
            _report(f"the server is not ready after {_START_LIMIT_S:g} s")
            return 1
        time.sleep(_POLL_S)
    pending.close()  # nothing of ours is left even if we are killed from now on
    with Client(record.grpc) as client:
        try:
            _answer(client, prompt)
        except CallFailed as error:
            _report(str(error))
            return 1
    return 0


def _answer(client: Client, prompt: str) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)
    print(f"\n> {prompt}", flush=True)
    started = time.monotonic()
    generation = client.chat([ChatMessage("user", prompt)], sampling, _ANSWER_LIMIT_S)
    stream_text(generation)
    seconds = time.monotonic() - started
    assert generation.finished is not None
    num_tokens = generation.finished.usage.output_token_count
    print(f"\n{num_tokens} tokens in {seconds:.2f} s\n")
    print(rank_table(_ranks_at_rest(client)), flush=True)


def _ranks_at_rest(client: Client) -> Sequence[RankInfo]:
    """The ranks once their counts agree, after the answer: what a server tells may be a second old.

    All but rank 0 report now and then, idle ones soon; a state from before the answer counts none.
    """
    deadline = time.monotonic() + _REST_LIMIT_S
    while True:
        ranks = client.server_info().ranks
        counts = {rank.all_reduce_count for rank in ranks}
        if (len(counts) == 1 and counts != {0}) or time.monotonic() > deadline:
            return ranks
        time.sleep(_POLL_S)


def _devices(num_ranks: int) -> str:
    """GPUs if the host has one for each rank, else the CPU."""
    num_gpus = count_gpus(os.environ)
    if num_gpus >= num_ranks:
        return ",".join(map(str, range(num_ranks)))
    return "cpu"


def _start_server(
    model_dir: Path, num_ranks: int, devices: str, ready_file: Path
) -> subprocess.Popen[bytes]:
    parent = os.getpid()
    command = [
        *(sys.executable, "-P", "-m", "lockstep", "serve", "--model", str(model_dir)),
        *("--served-model-name", "demo", "--tp", str(num_ranks), "--devices", devices),
        *("--port", "0", "--metrics-port", "0", "--ready-file", str(ready_file)),
        *("--restart", "off", "--max-num-seqs", "8", "--drain-seconds", "5"),
    ]
    return subprocess.Popen(
        command,
        env=daemon_environ(os.environ),
        stdin=subprocess.DEVNULL,
        process_group=0,
        # This process has no other thread yet: gRPC starts its own with the client.
        preexec_fn=lambda: die_with_parent(parent),
    )


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        server.wait(_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _report(line: str) -> None:
    print(f"lockstep demo: {line}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep demo", description=__doc__)
    parser.add_argument("--prompt", default=QUESTION, help="question to ask")
    parser.add_argument("--tp", type=int, default=_DEFAULT_RANKS, help="ranks (default: 2)")
    return parser
