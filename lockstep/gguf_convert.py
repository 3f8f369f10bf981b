"""Turns a llama-family GGUF file into a Hugging Face style folder, with numpy alone.

GGUF is the container of llama.cpp; its layout is documented in the ggml repository (docs/gguf.md)
and read here by the `gguf` package. Only what the demo model needs is supported: the llama
architecture with a byte-level BPE vocabulary. Anything else is refused by name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.errors import DemoModelError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_SPECIAL_TOKEN_TYPE = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def convert_gguf(source: Path, target: Path, report: Callable[[str], None]) -> None:
    """Write `target` (an existing empty folder) from the GGUF file `source`.

    Writes model.safetensors (float32), config.json, generation_config.json, tokenizer.json and
    tokenizer_config.json with the chat template. Files are flushed to disk before it returns.

    Raises DemoModelError for a model or vocabulary of another kind, and when a package is missing.
    """
    _require_packages()
    reader = _open_gguf(source)
    config = _model_config(reader)
    tensors = _tensors(reader, config, report)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    _save(tensors, target / "model.safetensors")
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", _generation_config(reader))
    _write_json(target / "tokenizer.json", _tokenizer(reader))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(reader))
    for path in target.iterdir():
        _flush(path)


def undo_rope_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a GGUF q or k matrix [num_heads * head_dim, hidden_size] in checkpoint order.

    llama.cpp rotates neighbouring pairs, Hugging Face's llama the two halves of a head, so the
    converter to GGUF interleaves each head's halves (convert_hf_to_gguf.py, `permute`); this takes
    the pairs apart again. Returns a new array.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def checkpoint_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor of a llama model. Raises DemoModelError if unknown."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    match = _LAYER_PATTERN.fullmatch(gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise DemoModelError(f"GGUF tensor {gguf_name} has no place in a llama model")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def _require_packages() -> None:
    """These are imported only where used: serving and the rest of the command need neither."""
    for name in ("gguf", "safetensors"):
        if importlib.util.find_spec(name) is None:
            raise DemoModelError(
                f"converting the demo model needs the Python package {name}: pip install {name}, "
                "or set DEMO_MODEL to a folder with a checkpoint"
            )


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _open_gguf(source: Path) -> GGUFReader:
    from gguf import GGUFReader

    return GGUFReader(source)


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.fields.get(name)
    if field is None:
        raise DemoModelError(f"GGUF file lacks the field {name}")
    return field.contents()


def _require(reader: GGUFReader, name: str, expected: str) -> None:
    found = _field(reader, name)
    if found != expected:
        raise DemoModelError(f"GGUF field {name} is {found!r}, only {expected!r} can be converted")


def _model_config(reader: GGUFReader) -> dict[str, Any]:
    _require(reader, "general.architecture", "llama")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": _field(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "vocab_size": _field(reader, "llama.vocab_size"),
        # A float32 in the file: the shortest decimal that rounds to it is the author's 1e-05.
        "rms_norm_eps": float(
            str(np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon")))
        ),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _tensors(
    reader: GGUFReader, config: dict[str, Any], report: Callable[[str], None]
) -> dict[str, np.ndarray]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for index, tensor in enumerate(reader.tensors):
        if index % 50 == 0:
            report(f"converting tensor {index + 1} of {len(reader.tensors)}")
        weight = _float32(tensor)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = undo_rope_permutation(weight, heads[kind])
        tensors[checkpoint_name(tensor.name)] = weight
    return tensors


def _float32(tensor: ReaderTensor) -> np.ndarray:
    from gguf import dequantize

    return np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def _generation_config(reader: GGUFReader) -> dict[str, Any]:
    # GGUF holds no sampling defaults; these are those of the example on the model's card.
    # Without them a model this small, sampled at temperature 1, loses its thread.
    return {
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _special_tokens(reader: GGUFReader) -> list[tuple[int, str]]:
    types = _field(reader, "tokenizer.ggml.token_type")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    return [
        (index, tokens[index]) for index, kind in enumerate(types) if kind == _SPECIAL_TOKEN_TYPE
    ]


def _added_token(text: str) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": text, **flags, "normalized": False, "special": True}


def _tokenizer(reader: GGUFReader) -> dict[str, Any]:
    """tokenizer.json. llama.cpp's pre-tokenizer "smollm" is: split off digits, then GPT-2's."""
    _require(reader, "tokenizer.ggml.model", "gpt2")
    _require(reader, "tokenizer.ggml.pre", "smollm")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, **_added_token(text)} for index, text in _special_tokens(reader)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in _field(reader, "tokenizer.ggml.merges")],
        },
    }


def _tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    tokens = _field(reader, "tokenizer.ggml.tokens")

    def token(role: str) -> str:
        return str(tokens[_field(reader, f"tokenizer.ggml.{role}_token_id")])

    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(reader, "llama.context_length"),
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "added_tokens_decoder": {
            str(index): _added_token(text) for index, text in _special_tokens(reader)
        },
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
