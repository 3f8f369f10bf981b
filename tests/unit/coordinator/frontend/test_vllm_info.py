"""What a gateway is told of model and load."""

import datetime
import json
from pathlib import Path

import pytest

from coordinator.frontend.checkpoint_text import CheckpointText
from coordinator.frontend.vllm_info import checkpoint_info, loads
from protos.lockstep.v1 import generate_pb2
from tests.unit.coordinator.frontend.fake_engine import write_ids_only_model, write_text_model


def test_only_the_checkpoints_own_defaults_are_told(tmp_path: Path) -> None:
    model = write_text_model(tmp_path)
    assert checkpoint_info(CheckpointText.load(model), "m").default_sampling_params_json == "{}"
    own = {"temperature": 0.6, "top_k": 20, "top_p": 1.0, "do_sample": True}
    (model / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    told = checkpoint_info(CheckpointText.load(model), "m").default_sampling_params_json
    assert json.loads(told) == {"temperature": 0.6, "top_k": 20}


def test_a_tokenizer_is_to_be_asked_for_only_where_there_is_one(tmp_path: Path) -> None:
    text = CheckpointText.load(write_text_model(tmp_path / "text"))
    path = checkpoint_info(text, "m").tokenizer_path
    assert path and not Path(path).exists()
    ids_only = CheckpointText.load(write_ids_only_model(tmp_path / "ids"))
    assert checkpoint_info(ids_only, "m").tokenizer_path == ""


def test_the_config_tells_the_family(tmp_path: Path) -> None:
    model = write_ids_only_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["X"], "bos_token_id": 1}
    config["pad_token_id"] = None
    (model / "config.json").write_text(json.dumps(config))
    info = checkpoint_info(CheckpointText.load(model), "m")
    assert (info.model_type, list(info.architectures)) == ("llama", ["X"])
    assert (info.bos_token_id, info.pad_token_id, list(info.eos_token_ids)) == (1, 0, [7])


def test_the_load_is_told_in_tokens_and_shares() -> None:
    server = generate_pb2.GetServerInfoResponse(
        running_count=2,
        waiting_count=3,
        block_count=10,
        block_size=16,
        max_num_seqs=8,
        kv_cache_usage=0.25,
    )
    (load,) = loads(server, datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)).loads
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (2, 3, 5)
    assert (load.num_used_tokens, load.max_total_num_tokens) == (40, 160)
    assert load.token_usage == pytest.approx(0.25) and load.utilization == pytest.approx(0.25)


def test_a_group_that_is_starting_has_no_load() -> None:
    answer = loads(generate_pb2.GetServerInfoResponse(), datetime.datetime.now(datetime.UTC))
    assert answer.loads[0].utilization == 0.0
