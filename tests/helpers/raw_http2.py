"""Clients that speak just enough HTTP/2 (RFC 9113) to misbehave in it."""

from __future__ import annotations

import asyncio
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
_ACK, _END_HEADERS = 1, 4
_CANCEL = struct.pack(">I", 8)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def call_headers(path: str, stream: int) -> bytes:
    """HEADERS that open a gRPC call and leave its message to come, without compression."""
    fields = [
        *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")),
        *(("content-type", "application/grpc"), ("te", "trailers")),
    ]
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields
    )
    return frame(HEADERS, _END_HEADERS, stream, block)


class RawConnection:
    """One connection; `is_cut` once the server has closed it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.is_cut = False
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def open(cls, address: str) -> RawConnection:
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    def hello(self) -> None:
        """Preface and settings, and the acknowledgement of the server's."""
        self.writer.write(PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, _ACK, 0))

    def open_and_reset(self, path: str, first: int, count: int) -> None:
        """Opens and cancels `count` calls, streams `first`, `first` + 2, ..."""
        for stream in range(first, first + 2 * count, 2):
            self.writer.write(call_headers(path, stream) + frame(RST_STREAM, 0, stream, _CANCEL))

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self.writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Answers pings as a live client does; else throws away what comes."""
        try:
            while True:
                header = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(header[:3], "big"))
                if header[3] == PING and not header[4] & _ACK:
                    self.writer.write(frame(PING, _ACK, 0, payload))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.is_cut = True
