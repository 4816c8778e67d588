"""Compressed files, decompressed up to a limit: a small file may unpack to any size."""

import bz2
import gzip
import io
import lzma
import zipfile
from pathlib import Path

LIMIT = 1 << 28
"""Maximum bytes of a file, and of its content when unpacked; the largest known files have 55 million."""
_MEMORY = 1 << 28
_PIECE = 1 << 20
_XZ_MAGIC, _BZ2_MAGIC = b"\xfd7zXZ\0", b"BZh"


def content(path: Path, limit: int | None = None) -> bytes:
    """Return the bytes of a file.

    Raises:
        ValueError: the file is too large.
        OSError: the file cannot be read.
    """
    limit = LIMIT if limit is None else limit
    with open(path, "rb") as file:
        read = file.read(limit + 1)
    if len(read) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return read


def xz(packed: bytes, limit: int | None = None) -> bytes:
    """Decompress one .xz stream.

    Raises:
        ValueError: not an .xz stream, damaged, truncated, followed by more data, or it unpacks to more than `limit` bytes.
    """
    if not packed.startswith(_XZ_MAGIC):
        raise ValueError("it is not an .xz file")
    try:
        return _stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY), packed, limit)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from error


def bzip2(packed: bytes, limit: int | None = None) -> bytes:
    """Decompress one .bz2 stream; raise as :func:`xz` does."""
    if not packed.startswith(_BZ2_MAGIC):
        raise ValueError("it is not a .bz2 file")
    try:
        return _stream(bz2.BZ2Decompressor(), packed, limit)
    except OSError as error:
        raise ValueError(str(error)) from error


def gunzip(packed: bytes, limit: int | None = None) -> bytes:
    """Decompress a .gz file.

    Raises:
        ValueError: the file unpacks to more than `limit` bytes.
        EOFError, OSError, zlib.error: the file is truncated or damaged.
    """
    limit = LIMIT if limit is None else limit
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
        return _limited(file.read(limit + 1), limit)


def check_zip(path: Path, limit: int | None = None) -> None:
    """Raise an error if a .zip or .npz file unpacks to more than `limit` bytes.

    Raises:
        ValueError: the file unpacks to more than `limit` bytes.
        zipfile.BadZipFile, OSError: the file is damaged or cannot be read.
    """
    limit = LIMIT if limit is None else limit
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > limit:
            raise ValueError(f"it unpacks to more than {limit:,} bytes")


def _stream(decompressor: lzma.LZMADecompressor | bz2.BZ2Decompressor, packed: bytes, limit: int | None) -> bytes:
    limit = LIMIT if limit is None else limit
    pieces, size = [decompressor.decompress(packed, _PIECE)], 0
    while not decompressor.eof:
        size += len(pieces[-1])
        if decompressor.needs_input:
            raise ValueError("it is truncated")
        if size > limit:
            break
        pieces.append(decompressor.decompress(b"", _PIECE))
    if decompressor.eof and decompressor.unused_data:
        raise ValueError("there is extra data after its end")
    return _limited(b"".join(pieces), limit)


def _limited(unpacked: bytes, limit: int) -> bytes:
    if len(unpacked) > limit:
        raise ValueError(f"it unpacks to more than {limit:,} bytes")
    return unpacked
