"""What a benchmark writes down."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from bench import record as record_module
from bench.record import RESULTS, Case, Record, command_line, report, settings, table

_PROJECT = Path(__file__).resolve().parents[3]


def _case(value: float, unit: str, peer: float | None) -> Case:
    return Case(
        case="decode",
        model="m",
        tp=1,
        dtype="bfloat16",
        batch_size=1,
        context=8,
        metric="any",
        unit=unit,
        value=value,
        runs=[value],
        peer=None if peer is None else {"name": "other", "value": peer},
    )


def _record(**fields: object) -> Record:
    values: dict[str, object] = {
        "bench": "serving",
        "command": "c",
        "server_command": "s",
        "hardware": {"gpu": "NVIDIA H200", "gpus": 2},
        "versions": {},
        "anchor": {},
        "config": {},
        "cases": [_case(2.0, "ms", 3.0)],
    }
    return Record(**{**values, **fields})  # type: ignore[arg-type]


def test_a_record_is_named_after_what_it_holds_and_never_overwritten(tmp_path: Path) -> None:
    record = _record(commit="0123456789abcdef", time_utc="2026-01-02T03:04:05Z", dirty=False)
    report(record, "tiny-tp2", tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == "serving_h200x2_tiny-tp2_2026-01-02_01234567.json"
    assert json.loads(file.read_text())["cases"][0]["value"] == 2.0
    report(_record(commit="0123456789abcdef", time_utc=record.time_utc), "tiny-tp2", tmp_path)
    names = sorted(path.stem for path in tmp_path.iterdir())
    assert names == [file.stem, f"{file.stem}_2"]
    assert json.loads(file.read_text())["dirty"] is False


@pytest.mark.parametrize(("unit", "ratio"), [("ms", "1.50x"), ("tok/s", "0.67x")])
def test_the_ratio_says_how_many_times_better_we_are(unit: str, ratio: str) -> None:
    assert ratio in table([_case(2.0, unit, 3.0)]).splitlines()[1]


def test_a_command_is_shown_without_the_places_of_one_machine() -> None:
    shown = command_line("serve", "--results", "/out", f"{_PROJECT}/bench/models/m", "a b", "/c/d")
    assert shown == "serve bench/models/m 'a b' d"
    assert command_line("serve", "--results=/out") == "serve"


def test_settings_hold_every_option_but_the_place_of_the_record() -> None:
    options = argparse.Namespace(model=_PROJECT / "bench" / "m", tp=2, seed=None, results=RESULTS)
    assert settings(options, seconds=1.5) == {
        "model": "bench/m",
        "tp": 2,
        "seed": None,
        "seconds": 1.5,
    }


def test_of_a_clean_copy_the_commit_is_what_the_operator_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BENCH_COMMIT", "feed")
    record = _record()
    assert (record.commit, record.dirty) == ("feed", False)


def test_outside_a_checkout_nobody_knows_the_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record_module, "_PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    record = _record()
    assert (record.commit, record.dirty) == ("unknown", None)


def test_kept_records_name_no_place_of_one_machine() -> None:
    records = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    assert records
    for record in records:
        words = f"{record['command']} {record['server_command']} {record['config']}".split()
        assert not [word for word in words if word.strip("'\"{},").startswith("/")]
        assert not re.search(r"""["' ]/[a-z]""", json.dumps(record))
