"""The state of every constrained output, and the mask of its next token. For one thread."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from coordinator.grammar.definition import BadDefinition, grammar_of
from coordinator.grammar.masks import mask_of_bits, packed_mask, without_ids
from protos.lockstep.v1 import generate_pb2, grammar_pb2, worker_pb2

_INVALID_ARGUMENT = 3  # of gRPC, which this process does not load
_NUM_CACHED = 64
_LONGEST_PROBLEM = 400
_UNMARKED = "\n<non-verbose/>"
# The library's own limits keep a mask to some tens of milliseconds; this one bounds memory, at one
# to two kilobytes a state.
_MAX_LEXER_STATES = 50_000


@dataclass
class _Output:
    matcher: LLMatcher
    num_tokens: int
    min_tokens: int
    stop_ids: Sequence[int]


class Unmet(Exception):
    """No token can follow, or the constraint cannot be compiled; the message says why."""


class Matchers:
    """Answers the engine's requests in order."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        """`tokenizer` ends outputs with the checkpoint's end-of-sequence ids; masks cover ids in
        [0, vocab_size)."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        self._outputs: dict[int, _Output] = {}
        self._compiled: OrderedDict[bytes, LLMatcher] = OrderedDict()  # least recently used first

    def answer(self, request: grammar_pb2.GrammarRequest) -> grammar_pb2.GrammarReply | None:
        """The answer to an open or an advance."""
        match request.WhichOneof("request"):
            case "open":
                return self._reply(request.open.key, lambda: self._open(request.open))
            case "advance":
                return self._reply(request.advance.key, lambda: self._advance(request.advance))
            case "close":
                self._outputs.pop(request.close.key, None)
        return None

    def _reply(self, key: int, work: Callable[[], worker_pb2.SlotMask]) -> grammar_pb2.GrammarReply:
        try:
            return grammar_pb2.GrammarReply(key=key, mask=work())
        except Unmet as problem:
            self._outputs.pop(key, None)
            return grammar_pb2.GrammarReply(
                key=key, status_code=_INVALID_ARGUMENT, status_message=str(problem)
            )

    def _open(self, request: grammar_pb2.OpenGrammar) -> worker_pb2.SlotMask:
        params = request.params
        kind = params.WhichOneof("constraint")
        output = _Output(
            self._compile(kind, params), 0, params.min_tokens, list(params.stop_token_ids)
        )
        self._outputs[request.key] = output
        for token_id in np.frombuffer(request.output_ids, "<i4").tolist():
            self._consume(output, token_id)
        return self._mask(output)

    def _advance(self, request: grammar_pb2.AdvanceGrammar) -> worker_pb2.SlotMask:
        output = self._outputs[request.key]
        self._consume(output, request.token_id)
        return self._mask(output)

    def _compile(self, kind: str, params: generate_pb2.SamplingParams) -> LLMatcher:
        definition = generate_pb2.SamplingParams()
        definition.CopyFrom(params)
        definition.ClearField("min_tokens")
        definition.ClearField("stop_token_ids")
        name = definition.SerializeToString()
        if name not in self._compiled:
            try:
                grammar = grammar_of(params)
            except BadDefinition as error:
                raise Unmet(f"{kind} cannot be used: {error}"[:_LONGEST_PROBLEM]) from error
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            _check(matcher, f"{kind} cannot be used")
            self._compiled[name] = matcher
            if len(self._compiled) > _NUM_CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(name)
        return self._compiled[name].deep_copy()

    def _consume(self, output: _Output, token_id: int) -> None:
        output.matcher.consume_token(token_id)
        output.num_tokens += 1
        _check(output.matcher, f"output token {output.num_tokens} does not fit the constraint")

    def _mask(self, output: _Output) -> worker_pb2.SlotMask:
        bits = output.matcher.compute_bitmask()
        what = f"the constraint cannot go on after {output.num_tokens} output tokens"
        _check(output.matcher, what)
        mask = mask_of_bits(bits, self._vocab_size)
        if not mask.any():
            raise Unmet(f"{what}: no token may follow")
        if output.num_tokens < output.min_tokens:
            mask = without_ids(mask, output.stop_ids)
        return packed_mask(mask)


def _check(matcher: LLMatcher, what: str) -> None:
    if matcher.is_error():
        problem = matcher.get_error().removesuffix(_UNMARKED)
        raise Unmet(f"{what}: {problem}"[:_LONGEST_PROBLEM])
