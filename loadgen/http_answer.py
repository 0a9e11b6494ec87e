"""HTTP/1.1 answers, read as they come: the framing of RFC 9112, without a copy more than needed."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

MAX_HEAD_BYTES = 65_536
LAST_CHUNK = b"\r\n0\r\n\r\n"
LAST_CHUNK_BYTES = len(b"0\r\n\r\n")
HEX = re.compile(rb"[0-9a-fA-F]{1,15}")
SIZES_KEPT = 4096
HEADS_KEPT = 64
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?", re.DOTALL)
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5]\d\d)(?: .*)?", re.DOTALL)


class BadAnswer(ValueError):
    """What came is no HTTP/1.1 answer that can be read; the message says why."""


Part = Literal[
    "head", "sized", "to the end", "chunk size", "chunk", "chunk end", "trailers", "over"
]
"""What of an answer comes next: its head; a body of known length, or one that ends with the
connection, or the size of a chunk, the chunk, its line end, and the trailers after the last."""


class Answer:
    """The parser of one answer. ``status`` is known after the head, ``part`` says where it stands."""

    __slots__ = ("_left", "_rest", "keep_alive", "part", "status")

    def __init__(self) -> None:
        self.status: int | None = None
        self.part: Part = "head"
        self.keep_alive = False
        """May the connection take another request after this answer?"""
        self._left = 0
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body among those of one read, joined. Raises BadAnswer.

        Bytes beyond the end of the answer make the connection unfit for another one.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        elif self.part == "chunk size" and (body := self._whole_chunks(data)):
            return body
        pieces: list[bytes] = []
        at, size_bytes = 0, len(data)
        while at < size_bytes and self.part != "over":
            if self.part == "chunk size":
                line_end = data.find(b"\r\n", at)
                try:
                    end = line_end + 2 + int(data[at:line_end], 16)
                except ValueError:
                    end = 0
                if at < line_end < end - 2 and data[end : end + 2] == b"\r\n":
                    pieces.append(data[line_end + 2 : end])
                    at = end + 2
                    continue
            at = self._step(data, at, pieces)
        if at < len(data) and self.part == "over":
            self.keep_alive = False
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def closed(self) -> bool:
        """The server closed the connection: was this the end of the answer?"""
        if self.part == "to the end":
            self.part = "over"
        self.keep_alive = False
        return self.part == "over"

    def _whole_chunks(self, data: bytes) -> bytes:
        """The body of a read that is whole chunks, all of one line, as those of token streams are.

        Of any other read nothing, and nothing is changed then.
        """
        over = data.endswith(LAST_CHUNK)
        lines = (data[:-LAST_CHUNK_BYTES] if over else data).split(b"\r\n")
        pieces = lines[1::2]
        try:
            sizes = list(map(_SIZES.__getitem__, lines[:-1:2]))
        except ValueError:
            return b""
        if lines[-1] or sizes != list(map(len, pieces)) or 0 in sizes:
            return b""
        if over:
            self.part = "over"
        return b"".join(pieces)

    def _step(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """One element of the answer from ``at`` on; returns where the next one begins."""
        if self.part == "head":
            return self._take_head(data, at)
        if self.part == "to the end":
            pieces.append(data[at:])
            return len(data)
        if self.part in ("sized", "chunk"):
            piece = data[at : at + self._left]
            pieces.append(piece)
            self._left -= len(piece)
            if not self._left:
                self.part = "over" if self.part == "sized" else "chunk end"
            return at + len(piece)
        end = data.find(b"\r\n", at)
        if end < 0:
            self._keep(data[at:])
            return len(data)
        line = data[at:end]
        if self.part == "chunk size":
            if not (match := CHUNK_SIZE.fullmatch(line)):
                raise BadAnswer(f"no size of a chunk: {line[:40]!r}")
            self._left = int(match[1], 16)
            self.part = "chunk" if self._left else "trailers"
        elif self.part == "chunk end":
            if line:
                raise BadAnswer(f"a chunk is longer than its size: {line[:40]!r}")
            self.part = "chunk size"
        elif not line:
            self.part = "over"
        return end + 2

    def _take_head(self, data: bytes, at: int) -> int:
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            if not b"HTTP/1."[: len(data) - at].startswith(data[at : at + 7]):
                raise BadAnswer(f"no HTTP/1.1 answer: {data[at : at + 40]!r}")
            self._keep(data[at:])
            return len(data)
        status, self.keep_alive, fields = _head(data[at:end])
        # After an interim answer the one to the request follows.
        if status >= 200 or status == 101:
            self.status = status
            self._frame(fields)
        return end + 4

    def _frame(self, fields: dict[bytes, bytes]) -> None:
        """How the body will be delimited (RFC 9112, section 6.3)."""
        coding = fields.get(b"content-encoding", b"identity")
        if coding != b"identity":
            raise BadAnswer(f"the answer is compressed, asked was identity: {coding[:40]!r}")
        transfer, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
        if self.status in (101, 204, 304):
            self.part = "over"
        elif transfer is not None:
            if transfer != b"chunked":
                raise BadAnswer(f"unknown Transfer-Encoding {transfer[:40]!r}")
            self.part = "chunk size"
        elif length is not None:
            # One that is repeated must be the same.
            if len(same := set(length.split(b","))) > 1 or not (size := same.pop()).isdigit():
                raise BadAnswer(f"no Content-Length: {length[:40]!r}")
            self._left = int(size)
            self.part = "sized" if self._left else "over"
        else:
            self.part = "to the end"

    def _keep(self, rest: bytes) -> None:
        """For the next read: the beginning of a line or of a head."""
        if len(rest) > MAX_HEAD_BYTES:
            raise BadAnswer(f"a head or a line of more than {MAX_HEAD_BYTES} bytes")
        self._rest = rest


@lru_cache(HEADS_KEPT)
def _head(text: bytes) -> tuple[int, bool, dict[bytes, bytes]]:
    """Status, whether the connection may be kept, and the fields, by names in small letters.

    A server's heads differ by their date, if at all.
    """
    first, *lines = text.split(b"\r\n")
    if not (match := STATUS_LINE.fullmatch(first)):
        raise BadAnswer(f"no HTTP/1.1 answer: {first[:40]!r}")
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise BadAnswer(f"no header: {line[:40]!r}")
        name, value = name.lower(), value.strip(b" \t").lower()
        fields[name] = fields[name] + b"," + value if name in fields else value
    keep_alive = match[1] == b"1" and b"close" not in fields.get(b"connection", b"")
    return int(match[2]), keep_alive, fields


class _Sizes(dict[bytes, int]):
    """Numbers by hexadecimal digits: those of a stream's chunks are few. Else raises ValueError."""

    def __missing__(self, line: bytes) -> int:
        if not HEX.fullmatch(line):
            raise ValueError(f"no size of a chunk: {line[:40]!r}")
        if len(self) >= SIZES_KEPT:
            self.clear()
        size = self[line] = int(line, 16)
        return size


_SIZES = _Sizes()
