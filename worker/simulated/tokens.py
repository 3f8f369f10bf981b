"""Tokens as a pure function of (seed, position, last token), so that every output is foreseeable.

Neither the length of a run, a preemption, a cached prefix nor the neighbours in a step can change
a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.sampling_params import MAX_ALTERNATIVES, MAX_STOP_IDS

Int32Array = npt.NDArray[np.int32]
UInt64Array = npt.NDArray[np.uint64]
_STOP_SALT = np.uint64(0x53544F50)
_WHICH_STOP_SALT = np.uint64(0x57484943)


def mix(words: UInt64Array) -> UInt64Array:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), element by element."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class TokenChooser:
    """Chooses tokens of `vocabulary`, int32 [n]; `stop_probability` is the chance of a stop id."""

    vocabulary: Int32Array
    stop_probability: float

    def choose(
        self,
        seeds: UInt64Array,
        positions: Int32Array,
        last_tokens: Int32Array,
        stop_ids: Int32Array,
        may_stop: npt.NDArray[np.bool_],
    ) -> tuple[Int32Array, npt.NDArray[np.bool_]]:
        """Token and whether it is a stop id, of each row.

        seeds, positions (of the chosen tokens) and last_tokens are [n]; stop_ids [n, 16], padded
        with -1 at the end; may_stop [n] says where a stop id may be chosen.
        """
        keys = mix(mix(mix(seeds) ^ positions.astype(np.uint64)) ^ last_tokens.astype(np.uint64))
        size = np.uint64(len(self.vocabulary))
        index = keys % size
        tokens = self.vocabulary[index]
        num_stops = (stop_ids >= 0).sum(axis=1)
        # By chance alone a stop id is never chosen: its neighbour is.
        for _ in range(MAX_STOP_IDS):
            hits = (stop_ids == tokens[:, None]).any(axis=1)
            if not hits.any():
                break
            index = np.where(hits, (index + np.uint64(1)) % size, index)
            tokens = self.vocabulary[index]
        chances = (mix(keys ^ _STOP_SALT) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        stops = may_stop & (num_stops > 0) & (chances < self.stop_probability)
        which = mix(keys ^ _WHICH_STOP_SALT) % np.maximum(num_stops, 1).astype(np.uint64)
        chosen_stops = stop_ids[np.arange(len(tokens)), which]
        return np.where(stops, chosen_stops, tokens).astype(np.int32), stops


def alternatives(
    tokens: Int32Array, vocab_size: int
) -> tuple[npt.NDArray[np.float32], Int32Array, npt.NDArray[np.float32]]:
    """Well-formed log-probabilities [n], alternatives [n, 20] and theirs [n, 20], all made up.

    The chosen token is the likeliest, the ids after it follow; a vocabulary that ends sooner pads
    with -1 and -inf.
    """
    places = np.arange(MAX_ALTERNATIVES)
    ids = (np.maximum(tokens, 0)[:, None] + places) % vocab_size
    values = np.tile((-0.7 * (places + 1)).astype(np.float32), (len(tokens), 1))
    ids[:, vocab_size:] = -1
    values[:, vocab_size:] = -np.inf
    return values[:, 0].copy(), ids.astype(np.int32), values
