"""Where files lie that are made once and can be made again."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def cache_dir(environ: Mapping[str, str]) -> Path:
    """$XDG_CACHE_HOME/lockstep, else ~/.cache/lockstep, else a folder of this user's in /tmp.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification asks.
    """
    configured = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(configured):
        return Path(configured) / "lockstep"
    if environ.get("HOME"):
        return Path(environ["HOME"]) / ".cache" / "lockstep"
    return Path(tempfile.gettempdir()) / f"lockstep-{os.getuid()}"
