"""Chat messages -> prompt, with the checkpoint's jinja template.

The environment is the one transformers renders in (sandboxed and immutable, blocks trimmed, loop
controls, `generation` blocks, `tojson` without HTML escapes, `raise_exception`, `strftime_now`),
so that the same messages give the same bytes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coordinator.errors import BadCheckpoint, BadRequest, TextUnavailable
from coordinator.frontend.checkpoint_files import read_json_object
from coordinator.frontend.control_token_mask import all_text
from coordinator.frontend.special_tokens import load_special_tokens
from coordinator.frontend.tokenizer import Tokenizer

Message = Mapping[str, Any]

# What a template can raise when messages are not what it expects: a missing key, None + str, ...
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """The chat templates of one checkpoint. Never changes once made; any thread may use it."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compiles `sources`, template name -> jinja text.

        `special_tokens` ("bos_token", ...) are variables of every template. Raises
        jinja2.TemplateSyntaxError.
        """
        environment = _make_environment(now)
        self._templates = {name: environment.from_string(text) for name, text in sources.items()}
        self._special_tokens = dict(special_tokens)
        # Masks must differ from what the template itself writes.
        self.own_text = all_text([*sources.values(), *special_tokens.values()])

    @classmethod
    def from_dir(cls, model_dir: Path) -> "ChatTemplate":
        """Reads chat_template.jinja, chat_template.json or tokenizer_config.json, the first found.

        Raises TextUnavailable if none has a template, BadCheckpoint if one is broken.
        """
        file, sources = _read_sources(model_dir)
        if not sources:
            raise TextUnavailable(
                f"{model_dir} has no chat template (looked for chat_template.jinja, "
                "chat_template.json and chat_template in tokenizer_config.json): "
                "send text or token ids"
            )
        try:
            return cls(sources, load_special_tokens(model_dir).named)
        except jinja2.TemplateSyntaxError as error:
            raise BadCheckpoint(file, f"chat template, line {error.lineno}: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text. `variables` are further variables the template may know.

        Raises BadRequest with the template's own words if it refuses the messages.
        """
        if not messages:
            raise BadRequest("chat.messages", [], "at least one message")
        template = self._select(tools)
        try:
            return template.render(
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **(self._special_tokens | dict(variables or {})),
            )
        except _RENDER_ERRORS as error:
            roles = [message.get("role") for message in messages]
            limit = f"what the chat template takes; it says: {error or type(error).__name__}"
            raise BadRequest("chat.messages", f"roles {roles}", limit) from error

    def _select(self, tools: object) -> jinja2.Template:
        """With several templates, "tool_use" is for requests with tools, "default" for others."""
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        raise TextUnavailable(
            f"the checkpoint has no default chat template, only {sorted(self._templates)}"
        )


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of the rendered messages; no special token is added that the template does not write.

    Control tokens are special only where the template writes them. In what the caller sent they
    are masked before rendering and encoded as plain characters (control_token_mask.py,
    literal_encoder.py). Without any, the rendered text is encoded as it is, so the ids are those
    of transformers' apply_chat_template(tokenize=True). What a template assembles itself, such as
    '<|' + role + '|>', is the template's.

    Raises BadRequest if the template refuses the messages.
    """
    sent = {
        "messages": [dict(message) for message in messages],
        "tools": None if tools is None else [dict(tool) for tool in tools],
        "documents": None if documents is None else [dict(document) for document in documents],
        "variables": dict(variables or {}),
    }
    taken = all_text(sent) + template.own_text
    masked, literals = tokenizer.control_token_mask.mask(sent, taken)
    rendered = template.render(
        masked["messages"],
        add_generation_prompt=add_generation_prompt,
        tools=masked["tools"],
        documents=masked["documents"],
        variables=masked["variables"],
    )
    if not literals:
        return tokenizer.encode(rendered, add_special_tokens=False)
    return tokenizer.literal_encoder.encode(rendered, literals)


class _GenerationBlocks(jinja2.ext.Extension):
    """Lets `{% generation %}` blocks, which mark what a model is trained on, pass through.

    They are compiled to a call block, as transformers does, so that variables set inside keep
    their scope.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = jinja2.nodes.CallBlock(self.call_method("_pass_through"), [], [], body)
        return call.set_lineno(line)

    def _pass_through(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


def _make_environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read_sources(model_dir: Path) -> tuple[Path, dict[str, str]]:
    """The file that holds the templates, and template name -> text; {} if there are none."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        named = {
            extra.stem: _read_text(extra)
            for extra in sorted((model_dir / "additional_chat_templates").glob("*.jinja"))
        }
        return file, {**named, "default": _read_text(file)}
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = model_dir / name
        template = read_json_object(file).get("chat_template")
        if template:
            return file, _named_sources(file, template)
    return file, {}


def _named_sources(file: Path, template: Any) -> dict[str, str]:
    match template:
        case str():
            return {"default": template}
        case [*entries] if all(isinstance(entry, dict) for entry in entries):
            return {str(entry.get("name")): str(entry.get("template")) for entry in entries}
    raise BadCheckpoint(file, "chat_template is neither a text nor a list of {name, template}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadCheckpoint(file, f"cannot be read: {error}") from error
