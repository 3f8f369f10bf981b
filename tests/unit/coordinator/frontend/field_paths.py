"""Whether what a refusal calls a field is one."""

import re
from typing import Any

from google.protobuf.descriptor import Descriptor


def is_field(path: str, message: Descriptor) -> bool:
    """The path leads from the message to a field of it, or to a oneof right in it."""
    descriptor: Any = message
    for part in path.split("."):
        name = re.sub(r"\[\d+\]$", "", part)
        if descriptor is None:
            return False
        if name in descriptor.oneofs_by_name and path == name:
            return True
        if name not in descriptor.fields_by_name:
            return False
        descriptor = descriptor.fields_by_name[name].message_type
    return True
