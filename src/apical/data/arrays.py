"""Raw arrays of both splits, and readers of .npz and LIBSVM files."""

import io
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apical.data import containers
from apical.errors import DataError

Labelled = tuple[NDArray[Any], NDArray[Any]]


class Arrays(NamedTuple):
    """Images (N, C, H, W) with raw pixel values and labels (N,) or numbers (N, M); `train` is None in a test-only copy."""

    train: Labelled | None
    test: Labelled


NPZ_DAMAGE = (
    *(OSError, ValueError, KeyError, EOFError, NotImplementedError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


def read_npz(path: Path, names: tuple[str, ...], remedy: str = "replace it") -> list[NDArray[Any]]:
    """Return the arrays `names` of a .npz file without unpickling; raise `DataError` if it is damaged or incomplete."""
    try:
        containers.check_zip(path)
        with np.load(path, allow_pickle=False) as archive:
            return [np.asarray(archive[name]) for name in names]
    except NPZ_DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged or not the expected .npz file ({reason}); {remedy}") from error


def _images(array: NDArray[Any], path: Path, remedy: str) -> NDArray[Any]:
    if array.ndim != 3:
        raise DataError(f"{path}: expected images (N, H, W); got shape {array.shape}; {remedy}")
    return array[:, None]


def read_kmnist(folder: Path, remedy: str) -> Arrays:
    """Read Kuzushiji-MNIST from its four official .npz files, or only from the two of the test split."""

    def split(part: str) -> Labelled:
        path = folder / f"kmnist-{part}-imgs.npz"
        (images,) = read_npz(path, ("arr_0",), remedy)
        (labels,) = read_npz(folder / f"kmnist-{part}-labels.npz", ("arr_0",), remedy)
        return _images(images, path, remedy), labels

    whole = all((folder / f"kmnist-train-{kind}.npz").is_file() for kind in ("imgs", "labels"))
    return Arrays(split("train") if whole else None, split("test"))


def read_kmnist_10k(folder: Path, remedy: str) -> Arrays:
    """Split the test images of Kuzushiji-MNIST in two: four fifths for training, in a fixed random order."""
    images, labels = read_kmnist(folder, remedy).test
    order = np.random.default_rng(0).permutation(len(images))
    train, test = np.split(order, [4 * len(order) // 5])
    return Arrays((images[train], labels[train]), (images[test], labels[test]))


def read_usps_npz(folder: Path, remedy: str) -> Arrays:
    """Read USPS from one .npz file: grey values times 1000, from -1000 to 1000."""
    path = folder / "usps.npz"
    names = ("train_images", "train_labels", "test_images", "test_labels")
    train_images, train_labels, test_images, test_labels = read_npz(path, names, remedy)
    train = (_images(train_images, path, remedy), train_labels)
    return Arrays(train, (_images(test_images, path, remedy), test_labels))


def read_usps_libsvm(folder: Path, remedy: str) -> Arrays:
    """Read USPS as distributed by LIBSVM (labels 1..10, grey values -1..1), converted to the values of the .npz file."""
    from sklearn.datasets import load_svmlight_file

    def split(name: str) -> Labelled:
        path = folder / name
        try:
            lines = io.BytesIO(containers.bzip2(containers.content(path)))
            images, labels = load_svmlight_file(lines, n_features=256, dtype=np.float32, zero_based=False)
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); {remedy}") from error
        return 1000 * images.toarray().reshape(-1, 1, 16, 16), labels.astype(np.int64) - 1

    return Arrays(split("usps.bz2"), split("usps.t.bz2"))
