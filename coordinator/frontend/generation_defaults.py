"""Stop ids and default sampling parameters of a checkpoint, from its generation_config.json.

Every key that would change the output is honoured or refused by name, so that a server never
answers differently from what the checkpoint's authors wrote down without saying so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.errors import BadCheckpoint, BadRequest
from coordinator.frontend.checkpoint_files import read_json_object
from coordinator.sampling_limits import MAX_STOP_IDS, SAMPLING_RANGES

_HONOURED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
)
# Keys that do not change which token is chosen here: bookkeeping, lengths that every request
# sets for itself, how another library runs or returns things, and what only acts together with
# features that are refused below.
_WITHOUT_EFFECT = frozenset(
    {
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "assistant_token_id",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "chat_format",
        "compile_config",
        "decoder_start_token_id",
        "disable_compile",
        "do_sample",
        "early_stopping",
        "eos_token_id",
        "is_assistant",
        "length_penalty",
        "max_context_size",
        "max_length",
        "max_matching_ngram_size",
        "max_new_tokens",
        "max_time",
        "max_window_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "target_lookbehind",
        "transformers_version",
        "trust_remote_code",
        "use_cache",
        "use_model_defaults",
        "user_token_id",
    }
)
# Keys that change the output and are not built: accepted only with the value that turns them off.
_OFF_VALUES: Mapping[str, tuple[object, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "generation_kwargs": (None, {}),
    "guidance_scale": (None, 1, 1.0),
    "low_memory": (None, False),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "sequence_bias": (None, {}),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1, 1.0),
    "watermarking_config": (None,),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a request that says nothing gets. The field defaults are those of the API."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def load_generation_defaults(model_dir: Path, vocab_size: int) -> GenerationDefaults:
    """Reads generation_config.json and, for end-of-sequence ids, config.json too.

    A token that either file calls end-of-sequence is one. `do_sample: false` makes the default
    temperature 0. Raises BadCheckpoint naming key and value for a value out of range, a value of
    an unknown key, and a value of a known key that asks for something not built.
    """
    file = model_dir / "generation_config.json"
    config = read_json_object(file)
    _refuse_what_is_not_built(file, config)
    sampling = {
        name: _number(file, name, config[name])
        for name in _HONOURED
        if config.get(name) is not None
    }
    if config.get("do_sample") is False:
        sampling["temperature"] = 0.0
    model_file = model_dir / "config.json"
    eos_token_ids = (
        *_eos_ids(file, config, vocab_size),
        *_eos_ids(model_file, read_json_object(model_file), vocab_size),
    )
    unique = tuple(dict.fromkeys(eos_token_ids))
    if len(unique) > MAX_STOP_IDS:
        raise BadCheckpoint(file, f"eos_token_id: {len(unique)} ids, at most {MAX_STOP_IDS}")
    top_k = int(sampling.pop("top_k", 0))
    return GenerationDefaults(eos_token_ids=unique, top_k=top_k, **sampling)


def _refuse_what_is_not_built(file: Path, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _HONOURED or key in _WITHOUT_EFFECT or value is None:
            continue
        if key not in _OFF_VALUES:
            raise BadCheckpoint(file, f"{key} = {value!r} is unknown; remove the key")
        if value not in _OFF_VALUES[key]:
            raise BadCheckpoint(
                file, f"{key} = {value!r} is not supported; remove the key or turn it off"
            )


def _number(file: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadCheckpoint(file, f"{name} = {value!r} is not a number")
    try:
        SAMPLING_RANGES[name].check(name, value)
    except BadRequest as error:
        raise BadCheckpoint(file, str(error)) from error
    if name == "top_k" and value != int(value):
        raise BadCheckpoint(file, f"{name} = {value!r} is not a whole number")
    return value


def _eos_ids(file: Path, config: Mapping[str, Any], vocab_size: int) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise BadCheckpoint(file, f"eos_token_id = {value!r} is not an id or a list of ids")
        if not 0 <= token_id < vocab_size:
            limit = f"in the vocabulary, 0 to {vocab_size - 1}"
            raise BadCheckpoint(file, f"eos_token_id = {token_id} is not {limit}")
    return ids
