"""Undoing gzip and deflate, a bounded amount at a time."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from swarm.errors import OriginError

MAX_OUTPUT_BYTES: Final = 512 * 1024
"""Most that one step puts into memory, whatever a hostile stream expands to."""

FREE_BYTES: Final = 64 * 1024 * 1024
MAX_EXPANSION: Final = 200
"""Beyond the first 64 MiB, output over input; text reaches 20, a bomb (a megabyte that becomes a gigabyte) 1,000."""


class Inflater:
    """A coded body -> the content.  `feed` all chunks, then call `finish`."""

    def __init__(self, encoding: str) -> None:
        self._bits = 16 + zlib.MAX_WBITS if encoding == "gzip" else 0
        self._head = b""
        self._decoder: zlib._Decompress | None = None
        self._fed = self._out = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Content, in parts of at most `MAX_OUTPUT_BYTES`.

        Raises:
            OriginError: Not what its Content-Encoding says, or it grows beyond all reason.
        """
        self._fed += len(data)
        data = self._begin(data)
        part = b""
        while data or len(part) == MAX_OUTPUT_BYTES:  # a full part may have left output inside the decoder
            if self._decoder is None or (self._decoder.eof and data):  # gzip members follow one another
                self._decoder = zlib.decompressobj(self._bits)
            try:
                part = self._decoder.decompress(data, MAX_OUTPUT_BYTES)
            except zlib.error as error:
                raise OriginError("its body is not compressed as it says") from error
            data = self._decoder.unconsumed_tail or self._decoder.unused_data
            self._out += len(part)
            if self._out > max(FREE_BYTES, self._fed * MAX_EXPANSION):
                raise OriginError("its compressed answer expands beyond all reason")
            if part:
                yield part

    def finish(self) -> bool:
        """Whether the stream came to its end."""
        return not self._fed or (self._decoder is not None and self._decoder.eof)

    def _begin(self, data: bytes) -> bytes:
        """Half of the servers that say deflate leave out the zlib header (RFC 9110, 8.4.1.2, note): two bytes tell.

        A raw stream would begin with 8 in its low bits only as a stored block with padding that no encoder writes.
        """
        if self._bits:
            return data
        self._head += data
        if len(self._head) < 2:
            return b""
        has_header = self._head[0] & 0x0F == 8 and int.from_bytes(self._head[:2], "big") % 31 == 0
        self._bits = zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS
        return self._head
