"""From what `--model` says to a folder: a path as it is, a hub id through huggingface_hub.

Only safetensors, JSON and tokenizer files are fetched: no pickled weights, no code. Where they are
cached, which hub is asked and with which token follow huggingface_hub's own environment variables
(HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import re
from pathlib import Path

from lockstep.errors import HubError

ALLOWED_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "merges.txt",
    "tokenizer.model",
)
# Files in folders belong to other formats; consolidated weights are the same ones a second time.
IGNORED_FILES = ("*/*", "consolidated*.safetensors")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def resolve_model(model: str) -> Path:
    """Folder of the checkpoint that `model` names, fetched into huggingface_hub's cache if need be.

    `model` is a folder, or a hub id `owner/name` with an optional `@revision`. A folder wins over a
    hub id of the same spelling. Blocks for as long as the download takes.

    Raises HubError, in one line, when it names neither or the hub does not give it.
    """
    folder = Path(model)
    if model and folder.is_dir():  # Path("") is the working folder
        return folder
    if not _HUB_ID.fullmatch(model) or folder.exists():
        raise HubError(
            f"--model {model}: no such folder, and not a hub id either (owner/name or "
            "owner/name@revision)"
        )
    repo_id, _, revision = model.partition("@")
    snapshot = _download(repo_id, revision or None)
    _check_complete(repo_id, snapshot)
    return snapshot


def _download(repo_id: str, revision: str | None) -> Path:
    # Here, not above: the import takes half a second that a local folder need not wait for.
    import httpx
    from huggingface_hub import constants, errors, snapshot_download

    hub = constants.ENDPOINT
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(ALLOWED_FILES),
                ignore_patterns=list(IGNORED_FILES),
            )
        )
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo_id} is gated: accept its terms at {hub}/{repo_id}, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{hub} has no model {repo_id}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no revision {revision}") from error
    except (OSError, httpx.HTTPError, errors.HFValidationError) as error:
        # A status of the hub, no connection, or a full disk; all are OSError or httpx's own.
        raise HubError(
            f"cannot fetch {repo_id} from {hub}: {_first_line(error)}: check the network, "
            "HF_ENDPOINT and the disk, or give --model a folder"
        ) from error


def _check_complete(repo_id: str, snapshot: Path) -> None:
    if not (snapshot / "config.json").is_file():
        raise HubError(f"{repo_id} has no config.json: not a model in Hugging Face layout")
    if not any(snapshot.glob("*.safetensors")):
        raise HubError(f"{repo_id} has no safetensors weights, the only format that is read")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".: ")
