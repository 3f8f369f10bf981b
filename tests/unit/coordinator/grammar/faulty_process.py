"""A grammar process that hangs, ends or takes memory at some constraints; for test_pool.py."""

import os
import sys
import time

from coordinator.grammar import __main__ as grammar_main
from coordinator.grammar.matchers import Matchers
from protos.lockstep.v1 import grammar_pb2


class FaultyMatchers(Matchers):
    """Does what a regex says."""

    def answer(self, request: grammar_pb2.GrammarRequest) -> grammar_pb2.GrammarReply | None:
        match request.open.params.regex:
            case "hang":
                time.sleep(1000)
            case "grow":
                bytearray(8 << 30)
            case "end":
                os._exit(3)
        return super().answer(request)


if __name__ == "__main__":
    vars(grammar_main)["Matchers"] = FaultyMatchers
    sys.exit(grammar_main.main(sys.argv[1:]))
