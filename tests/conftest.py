"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from lockstep.demo_model import demo_model_dir

# How long an example takes says more about the machine than about the code.
settings.register_profile("lockstep", deadline=None)
settings.load_profile("lockstep")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32: $DEMO_MODEL, or fetched once into the cache."""
    return demo_model_dir(os.environ, lambda line: print(line, file=sys.stderr))
