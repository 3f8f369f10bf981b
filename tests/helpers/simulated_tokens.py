"""The tokens of simulated workers, computed a second time with plain integers."""

from __future__ import annotations

from collections.abc import Sequence

_MASK = 2**64 - 1


def simulated_output(
    prompt_ids: Sequence[int],
    count: int,
    *,
    vocabulary: Sequence[int],
    daemon_seed: int = 0,
    request_seed: int = 0,
    stop_ids: Sequence[int] = (),
    stop_probability: float = 0.0,
    min_tokens: int = 0,
) -> list[int]:
    """At most `count` tokens, the last perhaps a stop id; request_seed is 0 for greedy ones."""
    seed = _mix(_mix(daemon_seed) ^ request_seed)
    output = list[int]()
    last = prompt_ids[-1]
    for position in range(len(prompt_ids), len(prompt_ids) + count):
        key = _mix(_mix(_mix(seed) ^ position) ^ last)
        chance = (_mix(key ^ 0x53544F50) >> 11) * 2.0**-53
        if stop_ids and len(output) >= min_tokens and chance < stop_probability:
            return [*output, stop_ids[_mix(key ^ 0x57484943) % len(stop_ids)]]
        index = key % len(vocabulary)
        while vocabulary[index] in stop_ids:
            index = (index + 1) % len(vocabulary)
        last = vocabulary[index]
        output.append(last)
    return output


def _mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _MASK
    return word ^ word >> 31
