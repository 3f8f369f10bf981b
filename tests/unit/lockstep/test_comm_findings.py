"""What doctor says about communication paths."""

from __future__ import annotations

from lockstep.comm_findings import comm_findings
from lockstep.findings import Status


def test_each_path_has_its_times_or_the_reason_why_it_is_off() -> None:
    paths = [
        {
            "operation": "all_reduce",
            "path": "one_shot",
            "usable": True,
            "detail": "checked",
            "times": [[8192, 3.94], [65536, 4.5]],
        },
        {
            "operation": "all_gather",
            "path": "staged",
            "usable": False,
            "detail": "wrong",
            "times": [],
        },
    ]
    probe = {"failures": [], "preflight": {"paths": paths, "table": "all_reduce: one_shot to 9"}}
    sound, off, chosen = comm_findings(probe)
    assert (sound.item, sound.value) == ("all_reduce by one_shot", "8192 B 3.9 us, 65536 B 4.5 us")
    assert (off.value, off.status) == ("off: wrong", Status.NOTE)
    assert chosen.value == "all_reduce: one_shot to 9"


def test_probe_that_failed_is_a_note_with_the_command_to_run() -> None:
    for probe in (
        {"failed": "needs 2 GPUs"},
        {"failures": [{"what": "preflight", "reason": "Traceback\nneeds 2 GPUs\n"}]},
    ):
        (finding,) = comm_findings(probe)
        assert finding.status is Status.NOTE and finding.value == "needs 2 GPUs"
        assert finding.remedy == "python -m tpcomm.bench preflight"
