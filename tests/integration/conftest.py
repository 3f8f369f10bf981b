"""Groups of real daemons that several files share, each started once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.served_group import ServedGroup
from tests.helpers.tiny_models import write_tiny_model

# One thread a rank: with more, ranks and tests on few cores wait for each other's turns.
CPU_FLAGS = ("--dtype", "float32", "--num-threads", "1", "--drain-seconds", "5")
SMOLLM2_FLAGS = (*CPU_FLAGS, "--max-model-len", "1024", "--kv-cache-bytes", "256M")


@pytest.fixture(scope="session")
def smollm2_tp2(
    smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedGroup]:
    """SmolLM2 in float32 on two ranks, 6 + 3 query heads."""
    folder = tmp_path_factory.mktemp("smollm2-tp2")
    with ServedGroup(smollm2_dir, folder, "--tp", "2", *SMOLLM2_FLAGS) as group:
        yield group


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama without tokenizer files, float32; its path has a space."""
    model_dir = tmp_path_factory.mktemp("tiny") / "tiny llama"
    write_tiny_model(model_dir, max_position_embeddings=4096)
    return model_dir
