"""Scikit-learn's 1,797 handwritten digits, read from its file: importing scikit-learn takes longer than a short run."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apical.data.arrays import Arrays

IS_TEST = bytes.fromhex(
    "000004883524104000064100934205001a00080100240028062c12001000940a009019120420f8a0028110a000080a8820441524494240"
    "a00a0000004004d80000818020004805c400104008a0100005404800301000020ec409000224840083a8013c20a6980a0000000b084008"
    "04a0184802024041c1008004404684376a810216004480004042a0a4180a5000840b8561c608108008004c80c02004068e000108820081"
    "00380803c008190000100e01008410a0210033282904c044c080680e0102830082008822a6402c24042108a860809081a00c0282024212"
    "0138a41500"
)
"""One bit per digit: `train_test_split(np.arange(1797), test_size=360, stratify=labels, random_state=0)` of scikit-learn."""


def embedded_digits() -> Arrays:
    """Return scikit-learn's 1,797 digits split into 1,437 + 360, stratified by class; the split is fixed."""
    images, labels = _images_and_labels()
    is_test = np.unpackbits(np.frombuffer(IS_TEST, np.uint8), count=len(labels)).astype(bool)
    return Arrays((images[~is_test], labels[~is_test]), (images[is_test], labels[is_test]))


@cache  # a comparison loads them for every run
def _images_and_labels() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images (1797, 1, 8, 8) with grey values 0 to 16, and labels (1797,)."""
    package = find_spec("sklearn")
    path = Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if package else Path()
    if not path.is_file():  # this version of scikit-learn stores it elsewhere
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return bunch.images[:, None].astype(np.uint8), bunch.target.astype(np.int64)
    rows = np.loadtxt(path, np.uint8, delimiter=",")
    return rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].astype(np.int64)
