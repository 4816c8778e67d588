"""The restricted unpickler: Python 2's and today's pickles of a batch are read, anything else is refused."""

import os
import pickle
import struct

import numpy as np
import pytest

from apical.data.cifar import read_batch, read_cifar10, read_cifar100
from apical.errors import DataError

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
LABELS = [3, 0, 9, 300 % 10]


def python2_pickle(images, labels, key=b"labels"):
    """What Python 2 wrote: byte strings, numpy's old module name, a memo entry after every object."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01K" + bytes([len(images)]) + b"M" + struct.pack("<H", 3072) + b"\x86"
        b"cnumpy\ndtype\nq\x03" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", images.size) + images.tobytes() + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(key) + numbers + text(b"data") + array + b"u."


def todays_pickle(images, labels, key="labels", protocol=2):
    return pickle.dumps({"data": images.reshape(len(images), -1), key: labels, "filenames": [b"a.png"]}, protocol)


@pytest.mark.parametrize(
    "content",
    [python2_pickle(IMAGES, LABELS), todays_pickle(IMAGES, LABELS), todays_pickle(IMAGES, LABELS, protocol=4)],
)
def test_a_batch_is_read(tmp_path, content):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    images, labels = read_batch(path, "labels")
    np.testing.assert_array_equal(images, IMAGES)
    assert labels.tolist() == LABELS
    assert labels.dtype == np.int64


def test_folders_of_both_sets(tmp_path):
    for k in range(1, 6):
        (tmp_path / f"data_batch_{k}").write_bytes(python2_pickle(IMAGES + np.uint8(k), LABELS))
    (tmp_path / "test_batch").write_bytes(python2_pickle(IMAGES, LABELS))
    arrays = read_cifar10(tmp_path, "fetch it")
    np.testing.assert_array_equal(arrays.train[0][4:8], IMAGES + np.uint8(2))
    assert arrays.train[1].tolist() == LABELS * 5
    np.testing.assert_array_equal(arrays.test[0], IMAGES)
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(python2_pickle(IMAGES, LABELS, key=b"fine_labels"))
    assert read_cifar100(tmp_path, "fetch it").train[1].tolist() == LABELS


@pytest.mark.parametrize("make", [python2_pickle, todays_pickle])
def test_truncations_are_refused(tmp_path, make):
    content = make(IMAGES, LABELS)
    path = tmp_path / "test_batch"
    for length in [*range(0, len(content), 97), *range(200), *range(len(content) - 120, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="test_batch") as caught:
            read_batch(path, "labels", "fetch it again")
        assert str(caught.value).endswith("fetch it again")
        assert "\n" not in str(caught.value)


class Call:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_something_is_refused_and_nothing_is_called(tmp_path, protocol):
    path, trace = tmp_path / "test_batch", tmp_path / "trace"
    for call in (
        Call(os.system, f"touch {trace}"),
        Call(open, str(trace), "w"),
        Call(eval, f"open({str(trace)!r}, 'w')"),
        Call(getattr, [], "append"),
    ):
        for content in (call, {"data": call, "labels": []}):
            path.write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(DataError, match=r"refers to \w+\.\w+, which is not allowed"):
                read_batch(path, "labels")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cnumpy\nndarray.",
        b"\x80\x02cnumpy\ndtype\nN}U\x04namK\x01s\x86b.",  # tries to set attributes of the reader's stand-in
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(tNNU\x00tb.",
        b"\x80\x02cnumpy\ndtype\nU\x01O\x85R.",
        b"\x80\x02Pid\n.",
        pickle.dumps([1, 2, 3], 2),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, 2),
        pickle.dumps({"data": np.array([{}, {}], dtype=object), "labels": [0, 1]}, 2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, 2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, "1"]}, 2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}, 2),
        pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, 2),
        pickle.dumps({"data": "text", "labels": [0, 1]}, 2),
        pickle.dumps({"data": np.asfortranarray(np.zeros((2, 3072), np.uint8)), "labels": [0, 1]}, 2),
        pickle.dumps(np.uint8(3), 2),
    ],
)
def test_other_content_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "test_batch"
    path.write_bytes(content)
    with pytest.raises(DataError, match="test_batch") as caught:
        read_batch(path, "labels")
    assert "\n" not in str(caught.value)


def test_missing_batch_is_named(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_batch(tmp_path / "test_batch", "labels")
