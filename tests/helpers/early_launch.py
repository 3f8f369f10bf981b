"""What a compiled kernel must show if the next one, and it itself, may be launched early."""

from __future__ import annotations

import re
from typing import Any

_ACCESS = re.compile(r"\b(?:ld|st|atom|red|cp\.async)\.[\w.]*global")


def waits_for_previous(compiled: Any) -> bool:
    """Whether it is launched early, and waits before it touches memory."""
    ptx = compiled.asm["ptx"]
    wait, access = ptx.find("griddepcontrol.wait"), _ACCESS.search(ptx)
    return bool(compiled.metadata.launch_pdl) and 0 < wait < access.start() if access else False
