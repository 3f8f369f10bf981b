"""The tokenizer's files of a checkpoint as one zip archive, for callers without the folder."""

import asyncio
import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.errors import TextUnavailable
from protos.vllm_engine import vllm_engine_pb2

CHUNK_BYTES = 64 * 1024

# What the tokenizer libraries read; config.json tells them the family. No weights.
_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# The first that a zip archive can hold: the same files give the same archive.
_ANY_TIME = (1980, 1, 1, 0, 0, 0)


class TokenizerPieces:
    """The archive in pieces, made once for all who ask. On one event loop."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._making: asyncio.Task[Sequence[vllm_engine_pb2.GetTokenizerChunk]] | None = None

    async def get(self) -> Sequence[vllm_engine_pb2.GetTokenizerChunk]:
        """Makes them on a thread at the first call, and again after one that failed.

        A caller that is cancelled takes nothing from the others. Raises TextUnavailable.
        """
        if self._making is None or _has_failed(self._making):
            self._making = asyncio.create_task(asyncio.to_thread(_pieces, self._model_dir))
        return await asyncio.shield(self._making)


def tokenizer_archive(model_dir: Path) -> bytes:
    """A zip archive of those files that are there. Raises TextUnavailable if one cannot be read."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _NAMES:
            file = model_dir / name
            if file.is_file():
                archive.writestr(
                    zipfile.ZipInfo(name, _ANY_TIME), _content(file), zipfile.ZIP_DEFLATED
                )
    return buffer.getvalue()


def tokenizer_chunks(archive: bytes) -> Iterator[vllm_engine_pb2.GetTokenizerChunk]:
    """The archive in pieces; the last has its digest."""
    for start in range(0, len(archive), CHUNK_BYTES):
        end = start + CHUNK_BYTES
        is_last = end >= len(archive)
        yield vllm_engine_pb2.GetTokenizerChunk(
            data=archive[start:end],
            sha256=hashlib.sha256(archive).hexdigest() if is_last else "",
        )


def _pieces(model_dir: Path) -> Sequence[vllm_engine_pb2.GetTokenizerChunk]:
    return tuple(tokenizer_chunks(tokenizer_archive(model_dir)))


def _has_failed(task: asyncio.Task[Sequence[vllm_engine_pb2.GetTokenizerChunk]]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TextUnavailable(f"{file} cannot be read: {error}") from error
