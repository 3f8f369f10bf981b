"""The converted demo model against transformers' own reading of the same GGUF file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lockstep.demo_model import fetch_gguf
from lockstep.errors import DemoModelError
from lockstep.gguf_convert import checkpoint_name, convert_gguf, undo_rope_permutation

QUESTION = "What is the capital of France? Answer in one sentence."


def write_tiny_gguf(path: Path, *, architecture: str = "llama", pre: str = "smollm") -> Path:
    """A llama with 4 query and 2 KV heads of size 8, in random Q8_0 weights."""
    hidden, ffn, heads, kv_heads, head_dim = 32, 64, 4, 2, 8
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *alphabet, "ab", "abc"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b", "ab c"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(0)

    def add_tensor(name: str, *shape: int) -> None:
        weight = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2 and "norm" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)

    add_tensor("token_embd.weight", len(tokens), hidden)
    add_tensor("output_norm.weight", hidden)
    add_tensor("output.weight", len(tokens), hidden)
    for layer in range(2):
        prefix = f"blk.{layer}."
        add_tensor(prefix + "attn_norm.weight", hidden)
        add_tensor(prefix + "attn_q.weight", heads * head_dim, hidden)
        add_tensor(prefix + "attn_k.weight", kv_heads * head_dim, hidden)
        add_tensor(prefix + "attn_v.weight", kv_heads * head_dim, hidden)
        add_tensor(prefix + "attn_output.weight", hidden, heads * head_dim)
        add_tensor(prefix + "ffn_norm.weight", hidden)
        add_tensor(prefix + "ffn_gate.weight", ffn, hidden)
        add_tensor(prefix + "ffn_up.weight", ffn, hidden)
        add_tensor(prefix + "ffn_down.weight", hidden, ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_tensors(converted: dict[str, torch.Tensor], source: Path) -> None:
    """Every tensor of `converted` equals transformers' own load of the GGUF file, bit for bit."""
    config = load_gguf_checkpoint(str(source))["config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    expected = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)
    assert converted.keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(converted[name], tensor), name


def test_tensors_of_a_tiny_model_equal_transformers_load_of_the_gguf(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    target = tmp_path / "out"
    target.mkdir()
    convert_gguf(source, target, lambda line: None)
    assert_same_tensors(load_file(target / "model.safetensors"), source)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert loaded.config.tie_word_embeddings is False
    assert loaded.config.rms_norm_eps == 1e-5


def test_a_forgotten_permutation_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    target = tmp_path / "out"
    target.mkdir()
    monkeypatch.setattr("lockstep.gguf_convert.undo_rope_permutation", lambda weight, heads: weight)
    convert_gguf(source, target, lambda line: None)
    with pytest.raises(AssertionError, match="_proj"):
        assert_same_tensors(load_file(target / "model.safetensors"), source)


def test_undo_rope_permutation_takes_the_pairs_apart() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)
    undone = undo_rope_permutation(rows, num_heads=2)
    assert undone[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight", "rope_freqs"])
def test_a_tensor_without_a_place_is_refused_by_name(name: str) -> None:
    with pytest.raises(DemoModelError, match=name):
        checkpoint_name(name)


def test_another_architecture_or_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    for field, change in (
        ("general.architecture", {"architecture": "qwen2"}),
        ("tokenizer.ggml.pre", {"pre": "llama-bpe"}),
    ):
        source = write_tiny_gguf(tmp_path / f"{field}.gguf", **change)
        target = tmp_path / field
        target.mkdir()
        with pytest.raises(DemoModelError, match=field):
            convert_gguf(source, target, lambda line: None)


@pytest.mark.parametrize("missing", ["gguf", "safetensors"])
def test_a_missing_package_is_named_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(DemoModelError, match=f"package {missing}: pip install {missing}, or set"):
        convert_gguf(tmp_path / "any.gguf", tmp_path, lambda line: None)


@pytest.mark.net
def test_every_tensor_of_the_demo_model_equals_transformers_load_of_its_gguf(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    assert_same_tensors(load_file(smollm2_dir / "model.safetensors"), fetch_gguf(tmp_path))


def test_demo_model_tokenizer_loads_alike_in_tokenizers_and_transformers(smollm2_dir: Path) -> None:
    plain = tokenizers.Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    loaded = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    for text in ("Hello, world 2026!", "  naïve\n\n日本語 🙂", "<|im_start|>user\nhi<|im_end|>"):
        ids = plain.encode(text).ids
        assert loaded(text).input_ids == ids
        assert plain.decode(ids, skip_special_tokens=False) == text
    assert plain.encode("2026").ids == [plain.token_to_id(digit) for digit in "2026"]


def test_demo_model_is_sampled_as_its_card_says(smollm2_dir: Path) -> None:
    defaults = json.loads((smollm2_dir / "generation_config.json").read_text())
    assert (defaults["do_sample"], defaults["temperature"], defaults["top_p"]) == (True, 0.2, 0.9)


def test_demo_model_answers_the_question_in_the_readme(smollm2_dir: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
