"""The tokenizer's files in an archive, and the archive in pieces."""

import asyncio
import hashlib
import io
import os
import threading
import zipfile
from pathlib import Path

import pytest

from coordinator.errors import TextUnavailable
from coordinator.frontend.tokenizer_archive import (
    CHUNK_BYTES,
    TokenizerPieces,
    tokenizer_archive,
    tokenizer_chunks,
)
from tests.unit.coordinator.frontend.fake_engine import within


def test_it_holds_the_files_of_the_tokenizer_and_no_weights(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_text(name)
    archive = zipfile.ZipFile(io.BytesIO(tokenizer_archive(tmp_path)))
    assert sorted(archive.namelist()) == ["tokenizer.json", "tokenizer_config.json"]
    assert archive.read("tokenizer.json") == b"tokenizer.json"


def test_the_same_files_give_the_same_archive(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    first = tokenizer_archive(tmp_path)
    os.utime(tmp_path / "tokenizer.json", (1e9, 1e9))
    assert tokenizer_archive(tmp_path) == first


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")

    def broken(path: Path) -> bytes:
        raise OSError("I/O error")

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(TextUnavailable, match="tokenizer.json cannot be read: I/O error"):
        tokenizer_archive(tmp_path)


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_pieces_join_to_the_archive_and_only_the_last_has_its_digest(size: int) -> None:
    archive = bytes(range(256)) * (size // 256 + 1)
    archive = archive[:size]
    pieces = list(tokenizer_chunks(archive))
    assert b"".join(piece.data for piece in pieces) == archive
    assert all(len(piece.data) <= CHUNK_BYTES for piece in pieces)
    digests = [piece.sha256 for piece in pieces]
    assert digests == [""] * (len(pieces) - 1) + [hashlib.sha256(archive).hexdigest()]


def test_all_who_ask_share_pieces_that_are_made_once(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")

    async def main() -> None:
        pieces = TokenizerPieces(tmp_path)
        first, second = await within(asyncio.gather(pieces.get(), pieces.get()))
        assert first is second is await within(pieces.get())
        assert list(first) == list(tokenizer_chunks(tokenizer_archive(tmp_path)))

    asyncio.run(main())


def test_after_a_failure_the_next_call_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")

    def broken(path: Path) -> bytes:
        raise OSError("I/O error")

    async def main() -> None:
        pieces = TokenizerPieces(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", broken)
            with pytest.raises(TextUnavailable, match="I/O error"):
                await within(pieces.get())
        assert await within(pieces.get())

    asyncio.run(main())


def test_a_caller_that_goes_leaves_the_others_their_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    may_read = threading.Event()

    def slow(path: Path) -> bytes:
        assert may_read.wait(20)
        return b"{}"

    async def main() -> None:
        monkeypatch.setattr(Path, "read_bytes", slow)
        pieces = TokenizerPieces(tmp_path)
        gone, patient = (asyncio.create_task(pieces.get()) for _ in range(2))
        await asyncio.sleep(0)  # both have asked
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(gone)
        may_read.set()
        assert await within(patient)

    asyncio.run(main())
