"""The compact CIFAR form, against an encoder written pixel by pixel from its description."""

import hashlib
import json
import lzma

import numpy as np
import pytest

from apical.data import compact
from apical.errors import DataError


def encode(images, labels, **changes):
    """Images (N, 3, 32, 32) uint8 to one compact batch, with plain Python integers."""
    residuals = bytearray()
    red, green, blue = (images[:, k].astype(int).tolist() for k in range(3))
    zero = np.zeros_like(images[:, 0], int).tolist()
    for plane, base in ((green, zero), (red, green), (blue, green)):
        for image, other in zip(plane, base, strict=True):
            p = [[image[i][j] - other[i][j] for j in range(32)] for i in range(32)]
            for i in range(32):
                for j in range(32):
                    west = p[i][j - 1] if j else 0
                    north = p[i - 1][j] if i else 0
                    corner = p[i - 1][j - 1] if i and j else 0
                    predicted = sorted((west, north, west + north - corner))[1]
                    if not i:
                        predicted = west
                    elif not j:
                        predicted = north
                    signed = (p[i][j] - predicted + 128) % 256 - 128
                    residuals.append(2 * signed if signed >= 0 else -2 * signed - 1)
    rows = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).tobytes()
    header = {"n": len(images), "label_keys": ["coarse", "fine"], "planes": "g,r-g,b-g"}
    header |= {"images_sha256": hashlib.sha256(rows).hexdigest()} | changes
    names = "\n".join(f"{k}.png" for k in range(len(images))).encode()
    return lzma.compress(json.dumps(header).encode() + b"\n" + bytes(residuals) + bytes(len(labels)) + bytes(labels) + names)


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
IMAGES[2] = np.linspace(0, 255, 1024, dtype=np.uint8).reshape(32, 32)  # smooth, as photographs are
IMAGES[3] = 255 - IMAGES[2].transpose(0, 2, 1)
IMAGES[4, 0], IMAGES[4, 1] = 0, 255
LABELS = [1, 0, 5, 2, 9, 4]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APICAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    (place / "train_0.xz").write_bytes(encode(IMAGES[:4], LABELS[:4]))
    (place / "train_1.xz").write_bytes(encode(IMAGES[4:], LABELS[4:]))
    (place / "test.xz").write_bytes(encode(IMAGES[::-1], LABELS[::-1]))
    return place


def read(folder):
    return compact.read_folder(folder, "fetch it", train="train_*.xz", test="test.xz", label_key="fine")


def test_decoded_images_are_those_encoded(folder, cache):
    for _ in range(2):  # decoded, then from the cache
        arrays = read(folder)
        np.testing.assert_array_equal(arrays.train[0], IMAGES)
        np.testing.assert_array_equal(arrays.test[0], IMAGES[::-1])
        assert arrays.train[1].tolist() == LABELS
        assert arrays.test[1].tolist() == LABELS[::-1]


def test_second_load_comes_from_the_cache_and_a_damaged_one_is_rebuilt(folder, cache, monkeypatch):
    read(folder)
    (copy,) = (cache / "decoded").iterdir()
    whole = copy.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(compact, "read_batch", None)
        read(folder)
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole[:3000] + b"\x55\xaa" + whole[3002:]):
        copy.write_bytes(damaged)
        np.testing.assert_array_equal(read(folder).train[0], IMAGES)
        assert copy.read_bytes() != damaged
    np.savez(copy, **dict.fromkeys(("train_images", "train_labels", "test_images", "test_labels"), np.zeros(3)))
    np.testing.assert_array_equal(read(folder).train[0], IMAGES)
    assert [path.name for path in (cache / "decoded").iterdir()] == [copy.name]


def test_a_changed_batch_is_decoded_again(folder, cache):
    read(folder)
    (folder / "test.xz").write_bytes(encode(IMAGES[:2], LABELS[:2]))
    assert len(read(folder).test[0]) == 2


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("APICAL_CACHE", str(tmp_path / "file"))
    np.testing.assert_array_equal(read(folder).train[0], IMAGES)


def test_truncations_are_refused(tmp_path):
    content = encode(IMAGES[:1], LABELS[:1])
    path = tmp_path / "test.xz"
    for length in [0, 1, 5, 6, 11, 12, 40, len(content) // 2, len(content) - 13, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"test\.xz.*fetch it"):
            compact.read_batch(path, "fine", "fetch it")


@pytest.mark.parametrize(
    "content",
    [
        b"plain text",
        lzma.compress(b"no json\n"),
        lzma.compress(b"[1, 2]\n"),
        lzma.compress(b'{"n": 1}\n'),
        encode(IMAGES[:1], LABELS[:1], n=2),
        encode(IMAGES[:1], LABELS[:1], n=-1),
        encode(IMAGES[:1], LABELS[:1], planes="r,g,b"),
        encode(IMAGES[:1], LABELS[:1], images_sha256="0"),
        encode(IMAGES[:1], LABELS[:1], label_keys=["coarse"]),
    ],
)
def test_wrong_content_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "test.xz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"test\.xz") as caught:
        compact.read_batch(path, "fine")
    assert "\n" not in str(caught.value)
