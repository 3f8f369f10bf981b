"""What the benchmarks' command lines share."""

import argparse
from pathlib import Path

import pytest

from bench.cli import add_record_flags, model_dir, record_folder
from bench.record import RESULTS


def test_a_model_is_a_known_name_or_a_folder(tmp_path: Path) -> None:
    assert (model_dir("llama-3.1-8b") / "config.json").is_file()
    assert model_dir(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("argv", "folder"),
    [([], RESULTS), (["--results", "x"], Path("x")), (["--dry-run", "--results", "x"], None)],
)
def test_a_record_is_kept_unless_told_otherwise(argv: list[str], folder: Path | None) -> None:
    parser = argparse.ArgumentParser()
    add_record_flags(parser)
    assert record_folder(parser.parse_args(argv)) == folder
