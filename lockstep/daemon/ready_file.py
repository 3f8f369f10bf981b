"""The file by which a daemon says where it serves."""

import json
import os
from pathlib import Path


def write_ready_file(
    path: Path, *, role: str, rank: int | None, grpc: str, metrics: str, http: str = ""
) -> None:
    """Writes JSON {pid, role, rank, grpc, metrics} atomically; addresses are "host:port".

    With `http`, where a gateway serves, it holds that too. A reader sees no file or a whole one.
    Raises OSError.
    """
    record = {
        "pid": os.getpid(),
        "role": role,
        "rank": rank,
        "grpc": grpc,
        "metrics": metrics,
    }
    if http:
        record["http"] = http
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(partial, path)
