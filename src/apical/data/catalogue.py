"""The built-in data sets: shapes, normalisation, accepted folder layouts, and where to download them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from apical.data import arrays, cifar, compact, idx, student_teacher
from apical.data.digits import embedded_digits
from apical.data.text import python_source, tasks
from apical.data.text.sequences import Make
from apical.errors import ConfigError, unknown_name

Reader = Callable[[Path, str], arrays.Arrays]


@dataclass(frozen=True)
class Layout:
    """One folder layout of a data set, present if all `files` are (a trailing `?` also allows `.gz`)."""

    folder: str
    files: tuple[str, ...]
    read: Reader
    train: int
    test: int
    note: str = ""

    def missing(self, root: Path) -> list[str] | None:
        """Return the names of files missing under `root`; None if the folder itself is missing."""
        folder = root / self.folder
        if not folder.is_dir():
            return None
        return [name.rstrip("?") for name in self.files if not self._has(folder, name)]

    @staticmethod
    def _has(folder: Path, name: str) -> bool:
        if name.endswith("?"):
            return idx.present(folder, name[:-1]) is not None
        return (folder / name).is_file()


@dataclass(frozen=True)
class Remote:
    """Where a set is published: `files` at `base` with their checksums, kept in `folder`.

    A checksum is SHA-256 (64 hex digits) if a file with the published MD5 was available to compute it from, otherwise the
    published MD5 itself (32 digits), which detects a broken download but not a forged one.

    With `members`, the single file is a .tar.gz from which only these members (path and checksum) are kept.
    """

    base: str
    folder: str
    files: dict[str, str]
    members: dict[str, str] | None = None


@dataclass(frozen=True)
class Made:
    """A set that needs no files: its origin in words, the function that makes it, and its numbers of samples."""

    source: str
    make: Callable[[], arrays.Arrays]
    train: int
    test: int


@dataclass(frozen=True)
class Entry:
    """One data set. Raw pixels from `low` to `high` are scaled to 0..1 before `mean` and `std` apply.

    Its targets are class labels, numbers (`classes` per sample), the flattened normalised images themselves, or tokens, one
    for each position of a sequence; the last kind is made by `sequences`.
    """

    what: str
    classes: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layouts: tuple[Layout, ...]
    low: float = 0.0
    high: float = 255.0
    remote: Remote | None = None
    made: Made | None = None
    targets: Literal["labels", "numbers", "images", "tokens"] = "labels"
    sequences: Make | None = None


def entry(name: str) -> Entry:
    """Return the entry of a data set; raise `ConfigError` with the nearest name if it is unknown."""
    if name not in ENTRIES:
        raise unknown_data(name)
    return ENTRIES[name]


def unknown_data(name: str) -> ConfigError:
    """Return the error for an unknown data set, with the nearest name and the forms of user data."""
    return ConfigError(
        f"{unknown_name('data set', name, ENTRIES)}; or your own: FILE.npz, FILE.csv, FILE.txt, FOLDER, FILE.py:FUNCTION"
    )


_PYTHON_10 = (*cifar.TRAIN_10, "test_batch")
_KMNIST_TEST = ("kmnist-test-imgs.npz", "kmnist-test-labels.npz")
_KMNIST_TRAIN = ("kmnist-train-imgs.npz", "kmnist-train-labels.npz")


def _mnist_like(
    what: str,
    mean: float,
    std: float,
    base: str,
    folder: str,
    checksums: tuple[str, ...],
    before: tuple[Layout, ...] = (),
    after: tuple[Layout, ...] = (),
) -> Entry:
    """Return an entry of 28x28 grey images in ten classes, in MNIST's four IDX files or in layouts tried before or after."""
    layout = Layout(folder, tuple(f"{name}?" for name in idx.FILES), idx.read_folder, 60000, 10000)
    files = {f"{name}.gz": checksum for name, checksum in zip(idx.FILES, checksums, strict=True)}
    remote = Remote(base, folder, files)
    return Entry(what, 10, (1, 28, 28), (mean,), (std,), (*before, layout, *after), remote=remote)


ENTRIES: dict[str, Entry] = {
    "digits": Entry(
        "handwritten digits, 8x8 grey",
        10,
        (1, 8, 8),
        (0.3054,),
        (0.3761,),
        (),
        high=16.0,
        made=Made("scikit-learn's bundled digits", embedded_digits, 1437, 360),
    ),
    "mnist": _mnist_like(
        "handwritten digits, 28x28 grey",
        *(0.1307, 0.3081),
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "MNIST/raw",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion-mnist": _mnist_like(
        "clothing, 28x28 grey",
        *(0.2860, 0.3530),
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "FashionMNIST/raw",
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "cifar-10": Entry(
        "small photographs, 32x32 RGB",
        10,
        (3, 32, 32),
        (0.4914, 0.4821, 0.4465),
        (0.2470, 0.2435, 0.2616),
        (
            Layout("cifar-10-batches-py", _PYTHON_10, cifar.read_cifar10, 50000, 10000),
            Layout(
                "cifar-10-xz",
                tuple(f"{name}.xz" for name in _PYTHON_10),
                partial(compact.read_folder, train="data_batch_*.xz", test="test_batch.xz", label_key="labels"),
                50000,
                10000,
            ),
        ),
        remote=Remote(
            "https://www.cs.toronto.edu/~kriz/",
            "cifar-10-batches-py",
            {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
            {
                "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
                "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
                "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
                "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
                "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
                "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
                "batches.meta": "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb",
            },
        ),
    ),
    "cifar-100": Entry(
        "small photographs in 100 classes, 32x32 RGB",
        100,
        (3, 32, 32),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        (
            Layout("cifar-100-python", ("train", "test"), cifar.read_cifar100, 50000, 10000),
            Layout(
                "cifar-100-part",
                ("train_0.xz", "test.xz"),
                partial(compact.read_folder, train="train_*.xz", test="test.xz", label_key="fine_labels"),
                10000,
                10000,
                "10,000 of the 50,000 training images",
            ),
        ),
        remote=Remote(
            "https://www.cs.toronto.edu/~kriz/",
            "cifar-100-python",
            {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
            {
                "train": "16019d7e3df5f24257cddd939b257f8d",
                "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
                "meta": "7973b15100ade9c7d40fb424638fde48",
            },
        ),
    ),
    "kmnist": _mnist_like(
        "cursive Japanese characters, 28x28 grey",
        *(0.1918, 0.3483),
        "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        "KMNIST/raw",
        (
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
        (Layout("KMNIST", _KMNIST_TRAIN + _KMNIST_TEST, arrays.read_kmnist, 60000, 10000),),
        (Layout("KMNIST-test", _KMNIST_TEST, arrays.read_kmnist, 0, 10000, "test split only"),),
    ),
    "kmnist-10k": Entry(
        "the 10,000 test images of kmnist, 8,000 of them for training; not comparable with kmnist",
        10,
        (1, 28, 28),
        (0.1918,),
        (0.3483,),
        (
            Layout("KMNIST-test", _KMNIST_TEST, arrays.read_kmnist_10k, 8000, 2000),
            Layout("KMNIST", _KMNIST_TEST, arrays.read_kmnist_10k, 8000, 2000),
        ),
        remote=Remote(
            "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
            "KMNIST-test",
            {
                "kmnist-test-imgs.npz": "692d824896bec8f3c357ebf7a0fe904ed67ac632ce953d0b58f7fbef7bb27d87",
                "kmnist-test-labels.npz": "660f13a4705431ea2a6391c41ecbe384cd0d932c595a101ec4f3b8989e785046",
            },
        ),
    ),
    "usps": Entry(
        "digits of postal codes, 16x16 grey",
        10,
        (1, 16, 16),
        (0.2545,),
        (0.3846,),
        (
            Layout("USPS", ("usps.npz",), arrays.read_usps_npz, 7291, 2007),
            Layout("USPS", ("usps.bz2", "usps.t.bz2"), arrays.read_usps_libsvm, 7291, 2007),
        ),
        low=-1000.0,
        high=1000.0,
        remote=Remote(
            "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/",
            "USPS",
            {
                "usps.bz2": "ec16c51db3855ca6c91edd34d0e9b197",
                "usps.t.bz2": "8ea070ee2aca1ac39742fdd1ef5ed118",
            },
        ),
    ),
}


def _student_teacher(outputs: int) -> Entry:
    maker = Made(
        "a fixed random teacher", partial(student_teacher.make, outputs), student_teacher.TRAIN, student_teacher.TEST
    )
    what = f"regression: the map from {student_teacher.INPUTS} to {outputs} numbers of a random ReLU network"
    shape, zeros, ones = (student_teacher.INPUTS,), (0.0,) * student_teacher.INPUTS, (1.0,) * student_teacher.INPUTS
    return Entry(what, outputs, shape, zeros, ones, (), high=1.0, made=maker, targets="numbers")


ENTRIES |= {
    "mnist-autoencoder": replace(
        ENTRIES["mnist"], what="regression: reconstruct MNIST's images, normalised", classes=784, targets="images"
    ),
    "fashion-mnist-autoencoder": replace(
        ENTRIES["fashion-mnist"],
        what="regression: reconstruct Fashion-MNIST's images, scaled to 0..1",
        classes=784,
        mean=(0.0,),
        std=(1.0,),
        targets="images",
    ),
    "cifar-10-autoencoder": replace(
        ENTRIES["cifar-10"],
        what="regression: reconstruct CIFAR-10's images, scaled to 0..1",
        classes=3072,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        targets="images",
    ),
    **{
        f"{name}-raw": replace(ENTRIES[name], what=f"{ENTRIES[name].what}, scaled to 0..1 only", mean=(0.0,), std=(1.0,))
        for name in ("digits", "mnist", "fashion-mnist")
    },
    **{
        f"cifar-10-std{factor:g}": replace(
            ENTRIES["cifar-10"],
            what=f"{ENTRIES['cifar-10'].what}, divided by {factor:g} standard deviations",
            std=tuple(factor * each for each in ENTRIES["cifar-10"].std),
        )
        for factor in (1.5, 3.0)
    },
    **{
        name: Entry(what, classes, (), (), (), (), targets="tokens", sequences=make)
        for name, what, classes, make in (
            ("text-python", "sources of Python's standard library; predict the next character", 96, python_source.make),
            ("copy", "a word over 8 symbols, to be repeated after a cue", tasks.SYMBOLS + 2, tasks.make_copy),
            ("recall", "pairs of 16 keys and values; predict the value of each key", 2 * tasks.KEYS + 1, tasks.make_recall),
        )
    },
    "student-teacher": _student_teacher(5),
    "student-teacher-1": _student_teacher(1),
}
