"""What identifies a checkpoint without reading its weights."""

import hashlib
from pathlib import Path

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class ModelDirError(Exception):
    """The folder is not a checkpoint; the message names the missing file."""


def model_digest(model_dir: Path) -> str:
    """SHA-256, hexadecimal, of config.json and the weight index.

    A checkpoint of one file has its safetensors header (names, types, shapes, offsets) as index; a
    folder without weights (dummy weights) has none. Raises ModelDirError.
    """
    config = model_dir / "config.json"
    if not config.is_file():
        raise ModelDirError(f"{model_dir} holds no config.json; --model wants a checkpoint folder")
    digest = hashlib.sha256(config.read_bytes())
    if (model_dir / _INDEX).is_file():
        digest.update((model_dir / _INDEX).read_bytes())
    elif (model_dir / _SINGLE).is_file():
        digest.update(_safetensors_header(model_dir / _SINGLE))
    return digest.hexdigest()


def _safetensors_header(path: Path) -> bytes:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > 100_000_000:
            raise ModelDirError(f"{path} is no safetensors file: its header claims {size} bytes")
        return file.read(size)
