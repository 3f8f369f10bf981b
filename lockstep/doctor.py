"""`lockstep doctor`: what this host has, what will be used, what is missing and how to get it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lockstep.bundle import Sources, collect
from lockstep.comm_findings import comm_findings
from lockstep.connection_flags import add_reach_flags, reach_config
from lockstep.daemon.exit_codes import ExitCode
from lockstep.errors import LockstepError
from lockstep.findings import Finding, Status, host_findings, package_findings
from lockstep.gpu_findings import gpu_findings, nccl_findings, torch_findings, use_findings
from lockstep.hub import resolve_model
from lockstep.probes import COMM, COMM_LIMIT_S, NCCL, SHARDS, TORCH, run_probe

_SETTINGS = Path("/etc/lockstep/lockstep.env")


def main(argv: Sequence[str]) -> int:
    """Print the report. Exit status 0, or 2 when something is missing that everything needs."""
    options = _parse(argv)
    torch_probe = run_probe(TORCH)
    nccl_probe = run_probe(NCCL, [options.nccl_path])
    findings = [
        *host_findings(),
        *package_findings(),
        *torch_findings(torch_probe),
        *gpu_findings(torch_probe),
        *nccl_findings(nccl_probe, torch_probe),
        *use_findings(torch_probe, nccl_probe),
    ]
    if options.comm:
        findings += comm_findings(run_probe(COMM, [str(COMM_LIMIT_S)], limit_s=2 * COMM_LIMIT_S))
    shards: dict[str, Any] | None = None
    if options.model:
        try:
            shards = run_probe(SHARDS, [str(resolve_model(options.model)), str(options.tp)])
        except LockstepError as error:
            shards = {"failed": str(error)}
        findings.append(shard_finding(shards, options.model, options.tp))
    if options.json:
        print(json.dumps({"findings": [asdict(found) for found in findings], "shards": shards}))
    else:
        print(render(findings))
        if shards is not None and "ranks" in shards:
            print(render_shards(shards))
    if options.bundle is not None and not _write_bundle(options, render(findings)):
        return ExitCode.CONFIG
    is_blocked = any(found.status is Status.MISSING for found in findings)
    return ExitCode.CONFIG if is_blocked else ExitCode.CLEAN


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lockstep doctor", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", default="", help="folder or hub id: show how it is split")
    parser.add_argument("--tp", type=_positive, default=1, help="ranks to split it over (1)")
    parser.add_argument("--nccl-path", default="", help="libnccl.so.2 to look at instead")
    parser.add_argument(
        "--comm", action="store_true", help="check and time what carries tensors between the GPUs"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    bundle = parser.add_argument_group(
        "bundle", "what is needed to find out what is wrong, without secrets, as one .tar.gz"
    )
    bundle.add_argument("--bundle", type=Path, metavar="FILE", help="write it here")
    text = "metrics to include, of a daemon at other than its default port; repeatable"
    bundle.add_argument("--metrics", action="append", default=[], metavar="HOST:PORT", help=text)
    text = "log to include the end of; repeatable. The journal of lockstep-* always is"
    _add_paths(bundle, "--log", text)
    text = f"file of settings to include; repeatable (default: {_SETTINGS} if it is there)"
    _add_paths(bundle, "--settings", text)
    add_reach_flags(parser)
    return parser.parse_args(argv)


def _add_paths(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    group.add_argument(name, action="append", default=[], type=Path, metavar="FILE", help=text)


def _write_bundle(options: argparse.Namespace, report: str) -> bool:
    """Writes the archive and says what is not in it; False if it cannot be written."""
    settings = options.settings or ([_SETTINGS] if _SETTINGS.exists() else [])
    try:
        client = reach_config(options, os.environ)
    except LockstepError as error:
        print(f"lockstep doctor: {error}", file=sys.stderr)
        return False
    sources = Sources(options.address, client, options.metrics, options.log, settings)
    bundle = collect(sources, report, os.environ)
    try:
        bundle.write(options.bundle)
    except OSError as error:
        print(f"lockstep doctor: --bundle {options.bundle}: {error.strerror}", file=sys.stderr)
        return False
    for note in bundle.notes:
        print(f"not in the bundle: {note}", file=sys.stderr)
    print(f"bundle: {options.bundle}, {len(bundle.files)} files", file=sys.stderr)
    return True


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def shard_finding(shards: dict[str, Any], model: str, world_size: int) -> Finding:
    """How evenly the model splits: the largest shard decides the memory that every rank needs."""
    item = f"{Path(model).name} on {world_size} rank{'s' if world_size > 1 else ''}"
    reason = shards.get("unsupported") or shards.get("failed")
    if reason:
        return Finding("model", item, "cannot be split", Status.MISSING, str(reason))
    largest = max(rank["weight_bytes"] for rank in shards["ranks"])
    share = largest / shards["full_weight_bytes"]
    value = (
        f"largest shard {_size(largest)}, {share:.1%} of the model "
        f"(an even split would be {1 / world_size:.1%})"
    )
    return Finding("model", item, value)


def render(findings: Sequence[Finding]) -> str:
    """The findings as a table; what is missing or notable has its remedy on the line below."""
    widths = [max(len(getattr(found, name)) for found in findings) for name in ("topic", "item")]
    lines = []
    for found in findings:
        topic, item = found.topic.ljust(widths[0]), found.item.ljust(widths[1])
        lines.append(f"{topic}  {item}  {found.status.value:7}  {found.value}")
        if found.remedy:
            lines.append(" " * (sum(widths) + 13) + f"-> {found.remedy}")
    return "\n".join(lines)


def render_shards(shards: dict[str, Any]) -> str:
    """One line a rank: heads, KV heads, FFN columns, vocabulary rows, bytes."""
    header = ("rank", "heads", "KV heads", "FFN", "vocabulary", "weights", "KV a token")
    rows = [
        (
            str(rank["rank"]),
            str(rank["q_heads"]),
            str(rank["kv_heads"]),
            str(rank["ffn"]),
            str(rank["vocab"]),
            _size(rank["weight_bytes"]),
            _size(rank["kv_bytes_per_token"]),
        )
        for rank in shards["ranks"]
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    ]
    return f"\n{shards['family']} in {shards['dtype']}\n" + "\n".join(lines)


def _size(num_bytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    size, unit = float(num_bytes), "B"
    for larger in ("KB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
