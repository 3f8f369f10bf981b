"""Messages on a stream that is cut anywhere."""

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import given
from hypothesis import strategies as st

from coordinator.frames import framed, take_frames


@given(payloads=st.lists(st.binary(max_size=40), max_size=12), cuts=st.lists(st.integers(1, 50)))
def test_frames_cut_anywhere_come_whole_and_in_order(
    payloads: list[bytes], cuts: list[int]
) -> None:
    messages = [BytesValue(value=payload) for payload in payloads]
    stream = b"".join(map(framed, messages))
    buffer, taken, start = bytearray(), [], 0
    for length in [*cuts, len(stream)]:
        buffer += stream[start : start + length]
        start += length
        taken += take_frames(buffer)
    assert taken == [message.SerializeToString() for message in messages] and not buffer


def test_a_length_that_cannot_be_is_noticed() -> None:
    four, five = BytesValue(value=b"12"), BytesValue(value=b"123")  # bytes when serialised
    with pytest.raises(AssertionError, match="5 bytes; at most 4"):
        take_frames(bytearray(framed(five)), max_bytes=4)
    assert take_frames(bytearray(framed(four)), max_bytes=4) == [four.SerializeToString()]
