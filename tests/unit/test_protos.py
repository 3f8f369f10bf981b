"""The public contract may grow and may not break: the check sees what it is there for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts import protos

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the check reads, to be changed."""
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    for path in (*(ROOT / "protos").rglob("*.proto"), ROOT / protos.BASELINE):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def change(checkout: Path, name: str, old: str, new: str) -> None:
    path = checkout / "protos" / "lockstep" / "v1" / name
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_the_protos_break_no_client_of_the_baseline(checkout: Path) -> None:
    assert protos.breaking(checkout) == 0


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("generate.proto", "optional float temperature = 1;", "optional float temperature = 91;"),
        ("generate.proto", "optional float top_p = 2;", "optional double top_p = 2;"),
        ("generate.proto", "repeated int32 stop_token_ids = 12;", "repeated int32 stop_ids = 12;"),
        ("generate.proto", "  rpc Abort(AbortRequest) returns (AbortResponse);\n", ""),
        ("step_log.proto", "int32 format_version = 1;", "int64 format_version = 1;"),
    ],
)
def test_a_planted_break_is_noticed(checkout: Path, name: str, old: str, new: str) -> None:
    change(checkout, name, old, new)
    assert protos.breaking(checkout) != 0


def test_a_new_field_and_a_change_between_our_own_daemons_are_no_break(checkout: Path) -> None:
    request = "message AbortRequest {\n"
    change(checkout, "generate.proto", request, request + "  // New.\n  string new_name = 99;\n")
    change(checkout, "engine.proto", "double budget_seconds = 1;", "double limit_seconds = 1;")
    assert protos.breaking(checkout) == 0
