"""IDX files: what is written comes back, and every kind of damage is named in one line."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from apical.data.idx import read_folder, read_idx
from apical.errors import DataError


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@given(
    array=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)),
    compress=st.booleans(),
)
def test_round_trip(tmp_path_factory, array, compress):
    path = tmp_path_factory.mktemp("idx") / "file"
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content, mtime=0) if compress else content)
    read = read_idx(path, array.ndim)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("compress", [False, True])
def test_every_truncation_is_refused_naming_file_and_remedy(tmp_path, compress):
    content = idx_bytes(IMAGES)
    content = gzip.compress(content, mtime=0) if compress else content
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError) as caught:
            read_idx(path, 3, "fetch it again")
        message = str(caught.value)
        assert str(path) in message
        assert message.endswith("fetch it again")
        assert "\n" not in message


def test_every_flipped_byte_of_a_gzip_file_is_noticed_or_harmless(tmp_path):
    content = gzip.compress(idx_bytes(IMAGES), mtime=0)
    path = tmp_path / "images.gz"
    refused = 0
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 0x55]) + content[index + 1 :])
        try:
            np.testing.assert_array_equal(read_idx(path, 3), IMAGES)
        except DataError:
            refused += 1
    assert refused > len(content) - 10  # the header's time stamp and operating system do not matter


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an IDX file"),
        (idx_bytes(IMAGES.reshape(-1)), "not an IDX file of bytes with 3 dimensions"),
        (b"\0\0\x0d\3" + idx_bytes(IMAGES)[4:], "not an IDX file"),
        (idx_bytes(IMAGES) + b"\0", "longer than its header says"),
        (b"\0\0\x08\3" + b"\xff" * 12 + bytes(24), "truncated"),
        (gzip.compress(idx_bytes(IMAGES), mtime=0) + b"junk", "damaged gzip"),
        (gzip.compress(b"", mtime=0), "truncated"),
    ],
    ids=["empty", "png", "one-dimension", "floats", "longer", "size-overflow", "gzip-junk", "gzip-of-nothing"],
)
def test_wrong_content_is_named(tmp_path, content, reason):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_idx(path, 3)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing"):
        read_idx(tmp_path / "nothing", 3)
    with pytest.raises(DataError, match="train-images-idx3-ubyte is missing"):
        read_folder(tmp_path, "fetch it")
