"""What `lockstep doctor --comm` reports: each communication path, and which serves which sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lockstep.findings import Finding, Status


def comm_findings(probe: dict[str, Any]) -> Iterator[Finding]:
    """From the JSON of `python -m tpcomm.bench preflight`, or from what became of it."""
    reason = probe.get("failed") or "; ".join(f["reason"] for f in probe.get("failures", ()))
    if reason:
        remedy = "python -m tpcomm.bench preflight"
        yield Finding("comm", "paths", _last_line(reason), Status.NOTE, remedy)
        return
    for path in probe["preflight"]["paths"]:
        item = f"{path['operation']} by {path['path']}"
        if path["usable"]:
            times = ", ".join(f"{size} B {us:.1f} us" for size, us in path["times"])
            yield Finding("comm", item, times or path["detail"])
        else:
            yield Finding("comm", item, f"off: {path['detail']}", Status.NOTE)
    yield Finding("comm", "chosen", probe["preflight"]["table"])


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
