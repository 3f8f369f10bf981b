"""Each rank holds its part of every tensor, and reads little more than that from the disk."""

from __future__ import annotations

import json
import multiprocessing
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.model_configs import make_config
from tests.helpers.tiny_models import TINY_MODELS, write_tiny_model
from worker.cpu_packing import can_pack
from worker.errors import CheckpointError
from worker.models.spec import ModelSpec, load_model_spec
from worker.sharding import ShardSpec, make_shard_spec
from worker.weight_layout import TransformerWeights
from worker.weights import LoadFormat, LoadReport, load_weights

CPU = torch.device("cpu")


def load_shard(
    model_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    load_format: LoadFormat = "safetensors",
) -> tuple[ModelSpec, ShardSpec, TransformerWeights, LoadReport, list[tuple[int, int]]]:
    spec = load_model_spec(model_dir)
    shard = make_shard_spec(spec, rank, world_size)
    steps: list[tuple[int, int]] = []
    weights, report = load_weights(
        model_dir,
        spec,
        shard,
        dtype=dtype,
        device=CPU,
        load_format=load_format,
        progress=lambda done, total: steps.append((done, total)),
    )
    return spec, shard, weights, report, steps


@pytest.fixture(scope="module", params=["llama", "llama_biases", "qwen2", "qwen3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def full_tensors(model_dir: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in model_dir.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_hold_their_rows_and_columns(model_dir: Path, world_size: int) -> None:
    full = full_tensors(model_dir)
    prefix = "model.layers.1."
    for rank in range(world_size):
        spec, shard, weights, _, _ = load_shard(model_dir, rank, world_size)
        layer, dim = weights.layers[1], spec.head_dim
        q_start = shard.q_head_start * dim
        kv_start, kv_size = shard.kv_head_start * dim, shard.num_local_kv_heads * dim
        q_size = shard.num_local_q_heads * dim
        expected = torch.cat(
            [
                full[prefix + "self_attn.q_proj.weight"][q_start : q_start + q_size],
                full[prefix + "self_attn.k_proj.weight"][kv_start : kv_start + kv_size],
                full[prefix + "self_attn.v_proj.weight"][kv_start : kv_start + kv_size],
            ]
        )
        assert torch.equal(layer.qkv, expected)
        o = full[prefix + "self_attn.o_proj.weight"]
        assert torch.equal(layer.o, o[:, q_start : q_start + q_size])
        ffn = slice(shard.ffn_start, shard.ffn_start + shard.num_local_ffn)
        gate, up = layer.gate_up.tensor_split(2)
        assert torch.equal(gate[: shard.num_local_ffn], full[prefix + "mlp.gate_proj.weight"][ffn])
        assert torch.equal(up[: shard.num_local_ffn], full[prefix + "mlp.up_proj.weight"][ffn])
        down = full[prefix + "mlp.down_proj.weight"]
        assert torch.equal(layer.down[:, : shard.num_local_ffn], down[:, ffn])
        for padding in (gate, up, layer.down.t()):
            assert not padding[shard.num_local_ffn :].any()
        vocab = slice(shard.vocab_start, shard.vocab_start + shard.num_local_vocab)
        embedding = full["model.embed_tokens.weight"]
        assert torch.equal(weights.embedding[: shard.num_local_vocab], embedding[vocab])
        assert not weights.embedding[shard.num_local_vocab :].any()


def test_row_parallel_biases_are_held_once(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama_biases")
    held = [load_shard(tmp_path, rank, 3)[2].layers[0] for rank in range(3)]
    assert [layer.o_bias is not None for layer in held] == [True, False, False]
    assert [layer.down_bias is not None for layer in held] == [True, False, False]
    assert all(layer.qkv_bias is not None and layer.gate_up_bias is not None for layer in held)


def test_tied_embeddings_share_storage(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    _, _, weights, _, _ = load_shard(tmp_path)
    assert weights.lm_head.data_ptr() == weights.embedding.data_ptr()


def test_progress_ends_at_the_total_and_the_report_counts_the_shard(model_dir: Path) -> None:
    full = full_tensors(model_dir)
    _, _, _, report, steps = load_shard(model_dir)
    total = sum(tensor.nbytes for tensor in full.values())
    assert steps[-1] == (total, total) and steps == sorted(steps)
    assert report.bytes_read == total and report.seconds > 0
    assert report.num_parameters == sum(tensor.numel() for tensor in full.values())


def test_other_dtype_is_converted(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen3", dtype=torch.bfloat16)
    _, _, exact, _, _ = load_shard(tmp_path, 1, 2, torch.bfloat16)
    _, _, wide, _, _ = load_shard(tmp_path, 1, 2, torch.float32)
    assert wide.layers[1].down.dtype is torch.float32
    for name in ("qkv", "o", "gate_up", "down", "q_norm"):
        narrow = getattr(exact.layers[1], name)
        assert torch.equal(getattr(wide.layers[1], name), narrow.float())


def rewrite(model_dir: Path, **changes: torch.Tensor | None) -> None:
    path = model_dir / "model.safetensors"
    tensors = {name.replace(".", "__"): tensor for name, tensor in load_file(path).items()}
    merged = {**tensors, **changes}
    kept = {k.replace("__", "."): v for k, v in merged.items() if v is not None}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__norm__weight": None},
            r"tensor model\.norm\.weight: expected shape \[48\], found no",
        ),
        ({"model__norm__weight": torch.ones(47)}, r"expected shape \[48\], found \[47\]"),
        ({"model__norm__weight": torch.ones(48, dtype=torch.int8)}, r"expected dtype .* found I8"),
        (
            {"model__layers__0__self_attn__q_proj__bias": torch.ones(96)},
            r"q_proj\.bias: expected none of this name for a llama model",
        ),
        (
            {"model__layers__2__mlp__up_proj__weight": torch.ones(1)},
            r"of 2 layers, found F32 \[1\]",
        ),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_checkpoint_unlike_its_config_is_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str, rank: int
) -> None:
    write_tiny_model(tmp_path, "llama_linear_rope")
    rewrite(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_shard(tmp_path, rank, 2)


def test_harmless_extra_tensors_are_passed_over(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    head = torch.zeros(301, 72)
    rewrite(tmp_path, lm_head__weight=head, model__layers__0__rotary_emb__inv_freq=torch.ones(4))
    assert load_shard(tmp_path)[2].lm_head.any()


@pytest.mark.parametrize("name", ["llama_biases", "qwen3_tied_biases"])
def test_dummy_weights_do_not_depend_on_the_degree(tmp_path: Path, name: str) -> None:
    assert name in TINY_MODELS
    write_tiny_model(tmp_path, name)
    (tmp_path / "model.safetensors").unlink()
    spec, _, whole, report, steps = load_shard(tmp_path, load_format="dummy")
    assert report.bytes_read == 0 and steps[-1][0] == steps[-1][1]
    layer = whole.layers[0]
    assert torch.all(layer.input_norm == 1) and torch.all(whole.final_norm == 1)
    assert layer.qkv.abs().max() <= 1e-3 and 4e-4 < layer.qkv.abs().mean() < 6e-4
    assert torch.unique(layer.qkv).numel() > 0.99 * layer.qkv.numel()
    assert not torch.equal(layer.qkv, whole.layers[1].qkv)
    parts = [load_shard(tmp_path, rank, 3, load_format="dummy") for rank in range(3)]
    columns = [p[2].layers[0].down[:, : p[1].num_local_ffn] for p in parts]
    assert torch.equal(torch.cat(columns, dim=1), layer.down[:, : spec.ffn_size])
    rows = [p[2].embedding[: p[1].num_local_vocab] for p in parts]
    assert torch.equal(torch.cat(rows), whole.embedding[: spec.vocab_size])


def write_big_config(folder: Path, num_layers: int) -> None:
    config = make_config(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=8003,
        tie_word_embeddings=False,
    )
    (folder / "config.json").write_text(json.dumps(config))


def write_big_checkpoint(folder: Path, num_layers: int) -> None:
    """A bf16 checkpoint of a real model's proportions, made here."""
    write_big_config(folder, num_layers)
    _, _, weights, _, _ = load_shard(folder, dtype=torch.bfloat16, load_format="dummy")
    names = load_model_spec(folder).names
    tensors = {
        names.embedding: weights.embedding[:8003],
        names.lm_head: weights.lm_head[:8003],
        names.final_norm: weights.final_norm,
    }
    for index, layer in enumerate(weights.layers):
        q, k, v = torch.split(layer.qkv, [1024, 512, 512])
        gate, up = layer.gate_up.chunk(2)
        parts = {"q": q, "k": k, "v": v, "o": layer.o, "gate": gate, "up": up, "down": layer.down}
        for part, tensor in parts.items():
            tensors[getattr(names, part).format(layer=index) + ".weight"] = tensor.contiguous()
        tensors[names.input_norm.format(layer=index)] = layer.input_norm
        tensors[names.post_attention_norm.format(layer=index)] = layer.post_attention_norm
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def proc_value(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise AssertionError(f"{path} has no {key}")


def measure_load(folder: Path, rank: int, world_size: int, results: Connection) -> None:
    """In a process of its own: anonymous memory added, then bytes read, by one rank's load."""
    torch.zeros(1)
    spec = load_model_spec(folder)
    shard = make_shard_spec(spec, rank, world_size)

    def load() -> LoadReport:
        return load_weights(
            folder,
            spec,
            shard,
            dtype=torch.bfloat16,
            device=CPU,
            load_format="safetensors",
            progress=lambda done, total: None,
            pack=can_pack(torch.bfloat16, CPU),
        )[1]

    samples = [proc_value("/proc/self/status", "RssAnon")]
    loaded = threading.Event()

    def watch() -> None:
        while not loaded.wait(0.002):
            samples.append(proc_value("/proc/self/status", "RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        load()
    finally:
        loaded.set()
        watcher.join(10)
    memory = (max(samples) - samples[0]) * 1024
    # A second load, unobserved: reading /proc counts as reading, too.
    before = proc_value("/proc/self/io", "rchar")
    report = load()
    bytes_read = proc_value("/proc/self/io", "rchar") - before
    results.send((bytes_read, memory, report.num_parameters * 2))


def check_load_costs(folder: Path, world_size: int) -> None:
    spawn: Any = multiprocessing.get_context("spawn")
    for rank in range(world_size):
        receiver, sender = spawn.Pipe(duplex=False)
        process = spawn.Process(target=measure_load, args=(folder, rank, world_size, sender))
        process.start()
        try:
            assert receiver.poll(100), f"rank {rank} did not report within 100 s"
            bytes_read, memory, shard_bytes = receiver.recv()
        finally:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join(10)
        assert shard_bytes * 0.95 < bytes_read <= shard_bytes * 1.15, (
            rank,
            bytes_read,
            shard_bytes,
        )
        assert memory <= shard_bytes * 1.3, (rank, memory, shard_bytes)


def test_rank_reads_little_more_than_its_shard(tmp_path: Path) -> None:
    write_big_checkpoint(tmp_path, num_layers=3)
    check_load_costs(tmp_path, world_size=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rank_reads_little_more_than_its_shard_of_a_gibibyte(tmp_path: Path) -> None:
    write_big_checkpoint(tmp_path, num_layers=46)
    assert (tmp_path / "model.safetensors").stat().st_size > 1 << 30
    check_load_costs(tmp_path, world_size=4)
