"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lockstep.demo_model import demo_model_dir


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32: $DEMO_MODEL, or fetched once into the cache."""
    return demo_model_dir(os.environ, lambda line: print(line, file=sys.stderr))
