"""`lockstep status`: how a server is - ranks, versions, health, load, memory, last errors."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence

from lockstep.client import CallFailed, Client, ConfigError, ModelInfo, RankInfo, ServerInfo
from lockstep.connection_flags import add_reach_flags, reach_config
from lockstep.daemon.exit_codes import ExitCode
from lockstep.table import format_table


def main(argv: Sequence[str]) -> int:
    """Prints the status; returns 0 if requests can be answered, 1 if not, 2 for bad settings."""
    parser = argparse.ArgumentParser(prog="lockstep status", description=__doc__)
    add_reach_flags(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of a table")
    options = parser.parse_args(list(argv))
    try:
        with Client(options.address, reach_config(options, os.environ)) as client:
            server, model = client.server_info(), client.model_info()
    except ConfigError as error:
        print(f"lockstep status: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    except CallFailed as error:
        print(f"lockstep status: {error}", file=sys.stderr)
        return 1
    print(as_json(server, model) if options.json else render(options.address, server, model))
    return 0 if server.is_ready else 1


def as_json(server: ServerInfo, model: ModelInfo) -> str:
    """Both answers as one object, by the fields' names in the .proto file."""
    parts = {"server": dataclasses.asdict(server), "model": dataclasses.asdict(model)}
    return json.dumps(parts, indent=2)


def render(address: str, server: ServerInfo, model: ModelInfo) -> str:
    """The server in a few lines, then its ranks, a line each, then their last errors."""
    lines = [
        f"server     {address}, lockstep {server.version}, {_health(server)}",
        f"model      {model.model}, context {model.max_model_len}",
        f"load       {server.running_count} running of {server.max_num_seqs}, "
        f"{server.waiting_count} waiting, {server.kv_cache_usage:.0%} of "
        f"{server.block_count} KV blocks of {server.block_size} tokens in use",
        f"epoch      {server.epoch}",
        f"last loss  {server.last_loss or 'none'}",
        "",
        _ranks(server.ranks),
    ]
    errors = [f"rank {rank.rank}: {rank.last_error}" for rank in server.ranks if rank.last_error]
    return "\n".join([*lines, *([""] if errors else []), *errors])


def _health(server: ServerInfo) -> str:
    if server.is_draining:
        return "NOT_SERVING: draining"
    return "SERVING" if server.is_ready else f"NOT_SERVING: {server.cause or 'no cause given'}"


def _ranks(ranks: Sequence[RankInfo]) -> str:
    header = ("rank", "address", "host", "pid", "version", "device", "state", "memory")
    rows = [
        (
            rank.rank,
            rank.address,
            rank.host or "-",
            rank.pid or "-",
            rank.version or "-",
            rank.device or "-",
            "up" if rank.is_up else "down",
            _memory(rank.memory_bytes),
        )
        for rank in ranks
    ]
    return format_table(header, rows)


def _memory(by_kind: Mapping[str, int]) -> str:
    parts = [f"{kind} {size(count)}" for kind, count in sorted(by_kind.items()) if count]
    return ", ".join(parts) or "-"


def size(num_bytes: int) -> str:
    """In MiB, or GiB from 10 of them."""
    if num_bytes >= 10 * 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"
