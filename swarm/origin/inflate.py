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
        self._bits = 16 + zlib.MAX_WBITS if encoding == "gzip" else zlib.MAX_WBITS
        self._decoder = zlib.decompressobj(self._bits)
        self._began = False
        self._raw_allowed = encoding == "deflate"
        self._fed = self._out = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Content, in parts of at most `MAX_OUTPUT_BYTES`.

        Raises:
            OriginError: Not what its Content-Encoding says, or it grows beyond all reason.
        """
        self._fed += len(data)
        while data:
            if self._decoder.eof:  # gzip members follow one another
                self._decoder = zlib.decompressobj(self._bits)
            part = self._step(data)
            data = self._decoder.unconsumed_tail or self._decoder.unused_data
            self._out += len(part)
            if self._out > max(FREE_BYTES, self._fed * MAX_EXPANSION):
                raise OriginError("its compressed answer expands beyond all reason")
            if part:
                yield part
            elif not self._decoder.eof:
                return

    def finish(self) -> bool:
        """Whether the stream came to its end."""
        return self._decoder.eof or not self._fed

    def _step(self, data: bytes) -> bytes:
        try:
            part = self._decoder.decompress(data, MAX_OUTPUT_BYTES)
        except zlib.error as error:
            if not self._raw_allowed or self._began:
                raise OriginError("its body is not compressed as it says") from error
            # Half of the servers that say deflate leave out the zlib header (RFC 9110, 8.4.1.2, note).
            self._decoder = zlib.decompressobj(-zlib.MAX_WBITS)
            self._began = True
            return self._step(data)
        self._began = True
        return part
