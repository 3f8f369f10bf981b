"""Messages on a stream of bytes: a 4-byte little-endian length and the message, again and again."""

import struct

from google.protobuf.message import Message

MAX_FRAME_BYTES = 256 << 20
_LENGTH = struct.Struct("<I")


def framed(message: Message) -> bytes:
    """A message as it is sent."""
    payload = message.SerializeToString()
    return _LENGTH.pack(len(payload)) + payload


def take_frames(buffer: bytearray, max_bytes: int = MAX_FRAME_BYTES) -> list[bytes]:
    """The whole messages at the front of `buffer`, which are removed from it.

    AssertionError for one of more than `max_bytes`: both ends are ours.
    """
    frames = []
    start = 0
    with memoryview(buffer) as view:
        while len(view) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(view, start)
            assert length <= max_bytes, f"a message of {length} bytes; at most {max_bytes}"
            end = start + _LENGTH.size + length
            if len(view) < end:
                break
            frames.append(bytes(view[start + _LENGTH.size : end]))
            start = end
    del buffer[:start]
    return frames
