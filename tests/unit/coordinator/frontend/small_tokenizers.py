"""Small tokenizers of every kind that checkpoints have, built in memory."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

CONTROL_TOKENS = ("<|end_of_text|>", "<|im_start|>", "<|im_end|>")


def byte_level() -> Tokenizer:
    """As Llama 3, Qwen and SmolLM2: byte-level BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("Ġ", "w"),
        ("u", "s"),
        ("us", "e"),
        ("use", "r"),
        ("Ċ", "Ċ"),
        ("Ċ", "h"),
        ("<", "|"),
        # Two bytes of three, and a byte with the first of the next character.
        ("â", "Ĥ"),
        ("¬", "â"),
        ("ð", "Ł"),
    ]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS]
    )
    tokenizer.add_tokens(["<think>", "日本", "naïve"])
    return tokenizer


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """As Llama 2 and Mistral (`strip`) or Gemma: pieces with U+2581, rare characters as bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz<>|_[]/SINTHU.,!\n"]
    merges = [("▁", "h"), ("h", "e"), ("l", "l"), ("▁", "▁"), ("u", "s"), ("us", "e"), ("e", "r")]
    for token in (*pieces, *(left + right for left, right in merges), "é", "世"):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    prepend = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] * strip)])
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    return tokenizer


def metaspace(prepend_scheme: str = "first") -> Tokenizer:
    """As checkpoints converted without a legacy normaliser: Metaspace on both sides."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}
    merges = [("▁", "h"), ("h", "e"), ("l", "l"), ("▁", "w")]
    for token in (*"abcdefghijklmnopqrstuvwxyz<>|_\n", *(a + b for a, b in merges), "▁▁"):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def without_decoder() -> Tokenizer:
    """A bare BPE whose tokens the library joins with spaces."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT; no language model that generates has it."""
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2}))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def regex_replacing() -> Tokenizer:
    """A decoder with a regular expression."""
    tokenizer = without_decoder()
    tokenizer.decoder = decoders.Replace(Regex("a+"), "b")
    return tokenizer


STREAMING_KINDS: Mapping[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": lambda: byte_fallback(strip=False),
    "metaspace_first": metaspace,
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_never": lambda: metaspace("never"),
    "without_decoder": without_decoder,
}


def write_checkpoint(
    model_dir: Path,
    rust: Tokenizer,
    config: Mapping[str, Any] | None = None,
    templates: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes tokenizer.json and tokenizer_config.json; returns the folder."""
    model_dir.mkdir(parents=True, exist_ok=True)
    rust.save(str(model_dir / "tokenizer.json"))
    content: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    if len(templates) == 1:
        content["chat_template"] = templates[0][1]
    elif templates:
        content["chat_template"] = [{"name": name, "template": text} for name, text in templates]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return model_dir
