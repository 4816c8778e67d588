"""Data files that unpack to no end, or are no such files at all: one error, in a moment and in little memory."""

import bz2
import gzip
import io
import lzma
import time
import zipfile

import numpy as np
import pytest

from apical.data import compact, containers, idx
from apical.data.arrays import read_npz, read_usps_libsvm
from apical.errors import DataError

ZEROS = bytes(1 << 20)
CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [(lzma.compress, containers.xz), (bz2.compress, containers.bzip2), (gzip.compress, containers.gunzip)],
)
def test_whole_content_up_to_the_limit_and_not_beyond(pack, unpack):
    packed = pack(CONTENT)
    assert unpack(packed, len(CONTENT)) == CONTENT
    assert unpack(pack(b"")) == b""
    with pytest.raises(ValueError, match="unpacks to more than 299,999 bytes"):
        unpack(packed, len(CONTENT) - 1)


@pytest.mark.parametrize(("pack", "unpack"), [(lzma.compress, containers.xz), (bz2.compress, containers.bzip2)])
def test_damaged_streams(pack, unpack):
    packed = pack(CONTENT)
    for damaged in (
        b"",
        ZEROS,
        packed[:-9],
        packed[:99],
        packed + b"x",
        packed + packed,
        packed[:2000] + bytes(9) + packed[2009:],
    ):
        with pytest.raises(ValueError):
            unpack(damaged)


@pytest.mark.parametrize("kind", ["zeros", "zeros after the magic number", "packed zeros"])
def test_an_xz_file_of_zeros_is_refused_at_once(tmp_path, kind, monkeypatch):
    if kind == "packed zeros":
        monkeypatch.setattr(containers, "LIMIT", 10 << 20)
        content = lzma.compress(bytes(11 << 20), preset=0)
    else:
        content = b"\xfd7zXZ\0" * (kind != "zeros") + bytes(40_000_000)
    path = tmp_path / "test_batch.xz"
    path.write_bytes(content)
    began = time.process_time()
    with pytest.raises(DataError, match=r"test_batch\.xz is damaged"):
        compact.read_batch(path, "labels")
    assert time.process_time() - began < 10


@pytest.mark.parametrize("header", [b"[" * 60000, b'{"n": 1e999}', b'{"n": NaN}', b"[]"])
def test_an_odd_header_in_an_xz_file(tmp_path, header):
    path = tmp_path / "test_batch.xz"
    path.write_bytes(lzma.compress(header + b"\n" + bytes(100)))
    with pytest.raises(DataError, match=r"test_batch\.xz is damaged"):
        compact.read_batch(path, "labels")


def test_other_containers_that_unpack_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "LIMIT", 1 << 20)
    large = bytes((1 << 20) + 1)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(large, 1))
    with pytest.raises(DataError, match="unpacks to more than"):
        idx.read_idx(path, 3)
    path = tmp_path / "usps.bz2"
    path.write_bytes(bz2.compress(large, 1))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_usps_libsvm(tmp_path, "replace it")
    path = tmp_path / "large.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.npy", large)
    with pytest.raises(DataError, match="unpacks to more than"):
        read_npz(path, ("a",))


def test_an_npz_whose_header_promises_more_than_there_is(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", buffer.getvalue() + bytes(10))
    with pytest.raises(DataError, match=r"a\.npz is damaged"):
        read_npz(tmp_path / "a.npz", ("a",))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_training_data_that_are_not_finite_are_refused_by_the_commands(tmp_path, monkeypatch, capsys, value):
    from apical.cli.main import main

    images, labels = np.zeros((20, 16, 16), np.float32), np.arange(20) % 10
    images[7, 3, 3] = value
    (tmp_path / "USPS").mkdir()
    clean = np.zeros((10, 16, 16), np.float32)
    np.savez(
        tmp_path / "USPS/usps.npz", train_images=images, train_labels=labels, test_images=clean, test_labels=labels[:10]
    )
    monkeypatch.setenv("APICAL_DATA", str(tmp_path))
    for command in (("train",), ("compare", "--seeds", "1"), ("audit",), ("sweep", "--space", "lr=0.1")):
        assert main([*command, "--data", "usps", "--model", "mlp-4", "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said == "apical: error: usps train split: NaN or infinity in the sample at index 7\n"
        assert not (tmp_path / "out").exists()
