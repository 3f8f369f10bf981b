"""A real gateway before a real model, one for the session."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.served_group import ServedGroup

# Where the packages of the extra are missing, as after a plain `make setup`, there is nothing to
# import; `make test-http` then finds no tests, which is a failure.
collect_ignore_glob = [] if importlib.util.find_spec("openai") else ["test_*.py"]

MODEL = "smol"
_FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--num-threads", "1"),
    *("--max-model-len", "1024", "--kv-cache-bytes", "256M", "--drain-seconds", "5"),
    *("--http", "127.0.0.1:0"),
)


@pytest.fixture(scope="session")
def group(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    """SmolLM2 in float32 on one rank, and a gateway at `group.http`."""
    with ServedGroup(smollm2_dir, tmp_path_factory.mktemp("http"), *_FLAGS) as group:
        yield group
