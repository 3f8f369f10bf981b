"""What a frontend needs of a checkpoint folder: tokenizer, chat template, defaults, digest."""

from dataclasses import dataclass
from pathlib import Path

from coordinator.errors import BadCheckpoint, TextUnavailable
from coordinator.frontend.chat_template import ChatTemplate
from coordinator.frontend.checkpoint_files import read_json_object
from coordinator.frontend.generation_defaults import GenerationDefaults, load_generation_defaults
from coordinator.frontend.tokenizer import Tokenizer
from lockstep.daemon.model_digest import model_digest
from protos.lockstep.v1 import generate_pb2

_TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class CheckpointText:
    """Read once at start. `tokenizer` is None where the folder has none: token ids only then."""

    model_dir: Path
    digest: str
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    defaults: GenerationDefaults

    @classmethod
    def load(cls, model_dir: Path) -> "CheckpointText":
        """Raises ModelDirError or BadCheckpoint naming the file at fault."""
        digest = model_digest(model_dir)
        tokenizer = template = None
        if (model_dir / _TOKENIZER_FILE).is_file():
            tokenizer = Tokenizer.from_dir(model_dir)
            template = _template_if_any(model_dir)
        defaults = load_generation_defaults(model_dir, _vocab_size(model_dir))
        return cls(model_dir, digest, tokenizer, template, defaults)

    def require_tokenizer(self) -> Tokenizer:
        """Raises TextUnavailable."""
        if self.tokenizer is None:
            raise TextUnavailable(
                f"the model folder has no {_TOKENIZER_FILE}: send token ids instead of text"
            )
        return self.tokenizer

    def require_chat_template(self) -> ChatTemplate:
        """Raises TextUnavailable."""
        if self.chat_template is None:
            raise TextUnavailable(
                "the model folder has no chat template: send text or token ids instead of chat"
            )
        return self.chat_template

    def model_response(self, served_model_name: str) -> generate_pb2.GetModelInfoResponse:
        """GetModelInfo's answer without the limits, which only the group knows."""
        return generate_pb2.GetModelInfoResponse(
            model=served_model_name,
            eos_token_ids=self.defaults.eos_token_ids,
            has_tokenizer=self.tokenizer is not None,
            has_chat_template=self.chat_template is not None,
            model_digest=self.digest,
        )


def _template_if_any(model_dir: Path) -> ChatTemplate | None:
    try:
        return ChatTemplate.from_dir(model_dir)
    except TextUnavailable:
        return None


def _vocab_size(model_dir: Path) -> int:
    file = model_dir / "config.json"
    vocab_size = read_json_object(file).get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise BadCheckpoint(file, f"vocab_size = {vocab_size!r} is not a positive integer")
    return vocab_size
