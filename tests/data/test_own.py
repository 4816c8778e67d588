"""Data of one's own: what is understood of files, folders, functions and Datasets, and what is refused in one line."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from apical import data
from apical.data.own import sources as own
from apical.errors import DataError

GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(3, 2, (50, 4)).astype(np.float32), np.arange(50) % 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def npz(folder: Path, **values: Any) -> str:
    np.savez(folder / "own.npz", **values)
    return "own.npz"


def csv(folder: Path, text: str) -> str:
    (folder / "own.csv").write_text(text, encoding="utf-8")
    return "own.csv"


def table(label: Any, header: str = "a,b,target", rows: int = 20) -> str:
    """Lines of two numbers and `label(i)`."""
    return "\n".join([header, *(f"{i},{i * i % 7},{label(i)}" for i in range(rows))]) + "\n"


def code(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text("import numpy as np\nimport torch\nX = np.ones((9, 2), 'f4')\n" + body)
    return "mine.py:make"


def test_npz_with_four_arrays_is_standardised_by_the_training_samples(folder: Path) -> None:
    loaded = data.load(npz(folder, x_train=X[:40], y_train=Y[:40], x_test=X[40:], y_test=Y[40:]))
    mean, std = X[:40].mean(0), X[:40].std(0)
    torch.testing.assert_close(loaded.train.inputs, torch.from_numpy((X[:40] - mean) / std), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.test.inputs, torch.from_numpy((X[40:] - mean) / std), atol=1e-5, rtol=1e-5)
    assert loaded.train.targets.tolist() == Y[:40].tolist()
    assert (loaded.classes, loaded.class_names) == (3, ())
    assert "standardised" in loaded.about


def test_a_column_that_never_changes_becomes_zeros(folder: Path) -> None:
    loaded = data.load(npz(folder, X=np.hstack([X, np.full((50, 1), 7)]), y=Y))
    assert loaded.train.inputs[:, 4].abs().max() == 0


@pytest.mark.parametrize("names", [("X", "y"), ("x", "y"), ("data", "target"), ("train_images", "train_labels")])
def test_npz_without_test_samples_is_divided_by_class_always_alike(folder: Path, names: tuple[str, str]) -> None:
    name = npz(folder, **dict(zip(names, (X[:45], Y[:45]), strict=True)))
    loaded = data.load(name)
    assert len(loaded.train) == 36
    assert torch.bincount(loaded.test.targets).tolist() == [3, 3, 3]
    own._read.clear()
    again = data.load(name)
    assert torch.equal(again.test.inputs, loaded.test.inputs)
    assert "a random fifth is set aside" in loaded.about


def test_images_get_their_channels_in_front(folder: Path) -> None:
    pixels = GENERATOR.integers(0, 256, (20, 6, 5, 3)).astype(np.uint8)
    assert data.load(npz(folder, x=pixels, y=Y[:20])).input_shape == (3, 6, 5)
    loaded = data.load(npz(folder, x=pixels[..., 0], y=Y[:20, None]))  # labels (N, 1), as Keras has them
    assert loaded.input_shape == (1, 6, 5)
    assert loaded.train.targets.dim() == 1
    channel = loaded.train.inputs
    assert abs(float(channel.mean())) < 1e-5
    assert abs(float(channel.std(correction=0)) - 1) < 1e-5


def test_labels_are_classes_whatever_they_are(folder: Path) -> None:
    texts = np.array(["dog", "cat", "eel"])[Y]
    loaded = data.load(npz(folder, x=X, y=texts))
    assert loaded.class_names == ("cat", "dog", "eel")
    assert set(loaded.train.targets.tolist()) == {0, 1, 2}
    gaps = data.load(npz(folder, x=X, y=np.array([2, 5, 9])[Y]))
    assert gaps.class_names == ("2", "5", "9")
    assert "3 classes (2, 5, 9)" in gaps.about
    one_hot = data.load(npz(folder, x=X, y=np.eye(3, dtype=int)[Y]))
    assert one_hot.classes == 3
    signs = data.load(npz(folder, x=X, y=np.where(Y > 0, 1, -1)))
    assert signs.class_names == ("-1", "1")


def test_real_targets_are_numbers_and_whole_ones_are_if_asked(folder: Path) -> None:
    loaded = data.load(npz(folder, x=X, y=X[:, 0] * 0.1))
    assert loaded.is_regression
    assert loaded.train.targets.shape == (40, 1)
    two = data.load(npz(folder, x=X, y=X[:, :2]))
    assert two.classes == 2
    name = npz(folder, x=X, y=Y)
    assert not data.load(name).is_regression
    assert data.load(name, numbers=True).is_regression


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"x_train": X}, "needs arrays x_train, y_train, x_test and y_test, or x and y; it contains x_train"),
        ({"x": X, "y": Y[:-1]}, "50 inputs but 49 targets"),
        ({"x": np.where(X > 5, np.nan, X), "y": Y}, "NaN or infinity in the sample at index"),
        ({"x": X, "y": np.where(Y > 1, np.inf, 0.5)}, "NaN or infinity in target 2"),
        ({"x": X, "y": Y - 1}, "label -1 is negative"),
        ({"x": X, "y": np.zeros(50, int)}, "all samples have the same label, 0"),
        ({"x": X, "y": np.arange(50)}, "50 different labels in 50 training samples; for regression use floats"),
        ({"x": np.array([{}] * 50), "y": Y}, "Python objects, which are not unpickled"),
        ({"x": X.astype(complex), "y": Y}, "inputs must be numbers; got complex128"),
        ({"x": X, "y": np.stack([Y, Y], 1)}, "integers of shape (50, 2) are not labels"),
        ({"x": X[:4], "y": Y[:4]}, "too few to set some aside"),
        ({"x": X[:0], "y": Y[:0]}, "there are no samples"),
        ({"x_train": X, "y_train": Y % 2, "x_test": X[:3], "y_test": Y[:3]}, "test sample 2 has class 2, which no training"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y}, "different shapes, (4,) and (3,)"),
        ({"x_train": X, "y_train": Y, "x_test": X}, "x_test has no counterpart"),
        (
            {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y.astype(str)},
            "some targets are strings and some numbers",
        ),
        ({"x": X, "y": np.array([b"a", b"b", b"\xff"])[Y]}, "the labels are bytes that are not UTF-8"),
        (
            {"x_train": X, "y_train": np.eye(3, dtype=int)[Y], "x_test": X, "y_test": np.eye(2, dtype=int)[Y % 2]},
            "one-hot rows of training and test targets have 3 and 2 columns",  # column 1 need not be the same class
        ),
        ({"x": X[:, :0], "y": Y}, "samples of shape (0,) are empty"),
    ],
)
def test_npz_refused(folder: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(npz(folder, **values))
    assert said in str(caught.value)
    assert "own.npz" in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_float32_are_refused_without_a_warning(folder: Path) -> None:
    with pytest.raises(DataError, match="infinity in target"):
        data.load(npz(folder, x=X, y=1e300 * X[:, 0].astype(float)))
    with pytest.raises(DataError, match="infinity in the sample"):
        load((X.astype(float) * 1e300, Y))


def test_arrays_that_are_not_read_are_said(folder: Path) -> None:
    arrays = {f"{kind}_{part}": values for part in ("train", "val", "test") for kind, values in (("x", X), ("y", Y))}
    assert "x_val, y_val ignored" in data.load(npz(folder, **arrays)).about


def test_labels_that_are_real_numbers_in_one_part_are_said(folder: Path) -> None:
    loaded = data.load(npz(folder, x_train=X, y_train=Y, x_test=X, y_test=Y.astype(float)))
    assert loaded.is_regression
    assert "all targets are whole numbers: write them as integers if they are classes" in loaded.about


def test_damaged_and_unknown_files(folder: Path) -> None:
    (folder / "broken.npz").write_bytes(b"PK\x03\x04rubbish")
    (folder / "own.pkl").write_bytes(b"")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (40, }".ljust(117) + b"\n"
    with zipfile.ZipFile(folder / "header.npz", "w") as archive:
        for name in ("x.npy", "y.npy"):
            archive.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(160))
    npz(folder, x=np.float32(1), y=np.arange(40) % 4)
    with pytest.raises(DataError, match="single number"):
        data.load("own.npz")
    for name, said in (
        ("header.npz", "damaged or not an .npz"),
        ("broken.npz", "damaged or not an .npz"),
        ("own.pkl", "unsupported kind of file"),
        ("none.csv", "no such file"),
    ):
        with pytest.raises(DataError, match=said):
            data.load(name)


def test_csv_takes_the_named_or_last_column(folder: Path) -> None:
    last = data.load(csv(folder, table(lambda i: i % 2, "a,b,c")))
    assert "the label is column 'c' (whole numbers)" in last.about
    named = data.load(csv(folder, table(lambda i: i, "a,Label,c").replace("\n1,", "\n 1 ,")))
    assert "the label is column 'Label'" in named.about
    assert named.input_shape == (2,)
    texts = data.load(csv(folder, table(lambda i: "yes" if i % 2 else "no")))
    assert texts.class_names == ("no", "yes")
    numbers = data.load(csv(folder, table(lambda i: i / 7, "a, in m;b;c").replace(",", ";").replace("a;", "a,", 1)))
    assert numbers.is_regression
    assert "semicolons" in numbers.about


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (table(lambda i: i % 2).replace("\n3,", "\n,"), "line 5: column 'a' is empty"),
        (table(lambda i: i % 2).replace("\n3,", "\nnan,"), "line 5: column 'a' is 'nan', which is not a finite number"),
        (table(lambda i: i % 2).replace("\n3,", "\nParis,"), "line 5: column 'a' is 'Paris'"),
        (table(lambda i: i % 2 if i != 4 else ""), "line 6: column 'target', the label, is empty"),
        (table(lambda i: i % 2 if i != 4 else "1,2"), "line 6: 4 values, but 3 columns"),
        (table(lambda i: i % 2, "1,2,3"), "the first line must name the columns"),
        (table(lambda i: i % 2, ",b,target"), "column 1 has no name"),
        (table(lambda i: i % 2, "Unnamed: 0,b,target"), "column 1 has no name"),  # as pandas writes what it read
        (table(lambda i: i % 2, "y,b,target"), "could both be the label"),
        (table(lambda i: i % 2, "a,a,target"), "two columns are called 'a'"),
        (table(lambda i: 1000 + i), "20 different labels in 20 training samples"),
        (table(lambda i: i, "class,b,c"), "20 training samples, where the label is column 'c' (whole numbers)"),
        (table(lambda i: i % 2 if i else "NA"), "line 2: column 'target', the label, is 'NA', but others are numbers"),
        (table(lambda i: "NA" if i == 4 else i % 2), "line 6: column 'target', the label, is 'NA', but others are numbers"),
        (
            table(lambda i: i % 2).replace(",", ";").replace("\n3;", "\n3,5;"),
            "is '3,5', which is not a finite number; use a decimal point",
        ),
        (table(lambda i: "word" if i == 9 else i / 3), "line 11: column 'target', the label, is 'word'"),
        ("target\n1\n2\n", "at least two columns"),
        ("a,target\n", "needs a line of column names"),
        ("", "needs a line of column names"),
    ],
)
def test_csv_refused(folder: Path, text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(csv(folder, text))
    assert said in str(caught.value)


@pytest.mark.parametrize(("offset", "scale"), [(1.7e9, 100.0), (0.0, 1e-14), (-70.0, 1e-3), (0.0, 1e-250), (1e301, 1e300)])
def test_columns_of_any_offset_and_unit_are_standardised(folder: Path, offset: float, scale: float) -> None:
    values = X.astype(np.float64)
    columns = np.concatenate([offset + scale * values, np.full((50, 1), 0.1)], axis=1)
    loaded = data.load(npz(folder, x_train=columns, y_train=Y, x_test=columns, y_test=Y))
    expected = torch.from_numpy((values - values.mean(0)) / values.std(0))
    assert torch.allclose(loaded.test.inputs[:, :-1], expected.float(), atol=1e-5)
    assert loaded.test.inputs[:, -1].abs().max() < 1e-6
    assert "1 of 5 columns constant" in loaded.about
    np.savetxt(folder / "own.csv", np.c_[columns, Y], "%.17g", ",", header="a,b,c,d,e,label", comments="")
    assert "1 of 5 columns constant" in data.load("own.csv").about


def picture(path: Path, value: int, size: tuple[int, int] = (5, 4), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode == "L" else (value, 0, 0)
    Image.new(mode, size, colour).save(path)


def pictures(folder: Path, parts: tuple[str, ...] = ("",), count: int = 5) -> str:
    for part in parts:
        for k, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(folder / "pets" / part / name / f"{i}.png", 100 * k + i)
    return "pets"


def test_a_folder_of_images(folder: Path) -> None:
    loaded = data.load(pictures(folder))
    assert (loaded.input_shape, loaded.class_names) == ((1, 4, 5), ("cat", "dog"))
    assert (len(loaded.train), len(loaded.test)) == (8, 2)
    brightness = loaded.train.inputs.mean((1, 2, 3))
    assert bool((brightness[loaded.train.targets == 1] > brightness[loaded.train.targets == 0].max()).all())
    picture(folder / "pets" / "dog" / "red.png", 200, mode="RGB")
    (folder / "pets" / "dog" / "notes.txt").write_text("")
    mixed = data.load("pets")
    assert mixed.input_shape == (3, 4, 5)
    assert "1 file that is not an image ignored" in mixed.about


def test_transparency_is_left_out_and_said(folder: Path) -> None:
    pictures(folder)
    Image.new("RGBA", (5, 4), (9, 9, 9, 255)).save(folder / "pets" / "dog" / "opaque.png")
    assert "transparency" not in data.load("pets").about
    Image.new("P", (5, 4)).save(folder / "pets" / "dog" / "palette.png", transparency=b"\x00\x80")
    loaded = data.load("pets")
    assert loaded.input_shape == (3, 4, 5)
    assert "transparency ignored" in loaded.about


def test_frames_but_the_first_are_left_out_and_said(folder: Path) -> None:
    pictures(folder)
    frames = [Image.new("L", (5, 4), value) for value in (0, 99)]
    frames[0].save(folder / "pets" / "dog" / "moving.gif", save_all=True, append_images=frames[1:])
    assert "all frames but the first ignored" in data.load("pets").about


@pytest.mark.parametrize("parts", [("train", "test"), ("Train", "Val")])
def test_train_and_test_folders(folder: Path, parts: tuple[str, str]) -> None:
    loaded = data.load(pictures(folder, parts))
    assert (len(loaded.train), len(loaded.test)) == (10, 10)


def test_folders_of_a_split_with_other_names(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no images for class 'testing'; it has folders \(cat, ...\): .* train and test"):
        data.load(pictures(folder, ("training", "testing")))


def test_a_changed_image_is_read_again_and_a_dangling_link_is_not_there(folder: Path) -> None:
    before = data.load(pictures(folder)).sha256
    (folder / "pets" / "cat" / "link.png").symlink_to("nowhere.png")
    assert data.load("pets").sha256 == before
    picture(folder / "pets" / "cat" / "0.png", 250)
    assert data.load("pets").sha256 != before


def test_image_folders_refused(folder: Path) -> None:
    def said() -> str:
        with pytest.raises(DataError) as caught:
            data.load("pets")
        return str(caught.value)

    (folder / "pets").mkdir()
    assert "needs one folder of images per class; found none" in said()
    pictures(folder, ("train", "test"))
    (folder / "pets" / "train" / "emu").mkdir()
    assert "no images for class 'emu'" in said()
    picture(folder / "pets" / "train" / "emu" / "0.png", 3)
    assert "no images for class 'emu'" in said()
    picture(folder / "pets" / "test" / "emu" / "0.png", 3, size=(6, 4))
    assert "6x4 pixels, but" in said()
    picture(folder / "pets" / "test" / "emu" / "0.png", 3)
    picture(folder / "pets" / "test" / "fox" / "0.png", 3)
    assert "class 'fox' does not occur in" in said()
    (folder / "pets" / "test" / "fox" / "0.png").unlink()
    (folder / "pets" / "test" / "fox").rmdir()
    (folder / "pets" / "train" / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "damaged or not an image" in said()
    Image.new("I;16", (5, 4)).save(folder / "pets" / "train" / "cat" / "0.png")
    assert "more than 8 bits" in said()


def test_a_function_returns_arrays_used_as_they_are(folder: Path) -> None:
    loaded = data.load(code(folder, "def make():\n  y = np.arange(9) % 2\n  return X, y, X[:4], y[:4]\n"))
    assert torch.equal(loaded.train.inputs, torch.ones(9, 2))
    assert (len(loaded.train), len(loaded.test)) == (9, 4)


def test_a_function_that_draws_from_global_generators_gives_the_same_data(folder: Path) -> None:
    body = "def make():\n  return torch.randn(20, 3), torch.from_numpy(np.random.randint(0, 2, 20))\n"
    first = data.load(code(folder, body))
    before = torch.get_rng_state()
    own._read.clear()
    assert data.load("mine.py:make").sha256 == first.sha256
    assert torch.equal(before, torch.get_rng_state())
    code(folder, body.replace("3)", "3) + 1"))
    assert data.load("mine.py:make").sha256 != first.sha256  # the changed file is run again


@pytest.mark.parametrize("names", [("x", "y"), ("X_train", "y_train"), ("data", "target")])
def test_a_dictionary_has_the_names_that_a_file_may_have(folder: Path, names: tuple[str, str]) -> None:
    loaded = data.load(code(folder, f"def make():\n  return {{'{names[0]}': X, '{names[1]}': np.arange(9) % 2}}\n"))
    assert (len(loaded.train) + len(loaded.test), loaded.classes) == (9, 2)


def test_what_loaders_of_scikit_learn_return() -> None:
    loaded = data.load("sklearn.datasets:load_iris")
    assert (loaded.input_shape, loaded.classes, len(loaded.train), len(loaded.test)) == ((4,), 3, 120, 30)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def make():\n  raise KeyError('no key')\n", "mine.py:make failed: KeyError: 'no key' (line 5)"),
        ("def make(path):\n  pass\n", "needs an argument 'path'"),
        ("def make():\n  return None\n", "got NoneType; expected a torch.utils.data.Dataset"),
        ("def make():\n  return X, X, X\n", "got tuple of length 3"),
        ("def make():\n  return X, X[:4], np.arange(9) % 2, np.arange(4) % 2\n", "the order is|four arrays are"),
        ("def make():\n  return X, np.array([None] * 9)\n", "an array of Python objects"),
        ("def make():\n  return X, None\n", "a NoneType is not supported"),
        ("def make():\n  return {'x_train': X, 'y_train': X[:, 0], 'x_test': X}\n", "x_test has no counterpart"),
        ("def make():\n  return np.ma.masked_array(X, mask=X > 0), np.arange(9) % 2\n", "masked values"),
        ("def make():\n  return [[1, 2], [3]], [0, 1]\n", "samples have different shapes"),
        ("def make():\n  return torch.zeros(9, 1, 2, 2, dtype=torch.uint8), np.arange(9) % 2\n", "8-bit pixels"),
        ("def made():\n  pass\n", "did you mean 'made'?"),
        ("import nothing_of_that_name\n", "cannot be loaded: ModuleNotFoundError"),
        ("def make():\n  raise SystemExit(3)\n", "failed: SystemExit: 3"),
        ("def make()\n", "cannot be loaded: SyntaxError"),
    ],
)
def test_functions_refused(folder: Path, body: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(code(folder, body))
    assert any(part in str(caught.value) for part in said.split("|"))
    assert "\n" not in str(caught.value)


class Items(Dataset[Any]):
    """A Dataset of given items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        return item() if callable(item) else item


class Endless(IterableDataset[Any]):
    """Without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


GOOD = [(torch.full((3,), float(i)), i % 2) for i in range(10)]


def load(value: Any) -> data.Dataset:
    return data.load(own.remember(value))


def test_datasets_in_memory() -> None:
    one = load(Items(GOOD))
    assert (len(one.train), len(one.test), one.input_shape) == (8, 2, (3,))
    two = load((Items(GOOD), Items(GOOD[:4])))
    assert two.train.inputs[:, 0].tolist() == list(range(10))
    assert two.test.targets.tolist() == [0, 1, 0, 1]
    tensors = TensorDataset(torch.stack([x for x, _ in GOOD]), torch.tensor([y for _, y in GOOD]))
    assert load((tensors, Items(GOOD[:4]))).sha256 == two.sha256  # the same content
    assert load((Items(GOOD), Items(GOOD[:2]))).sha256 != two.sha256


def test_a_dataset_that_knows_its_classes_has_them_all() -> None:
    items = Items(GOOD)
    items.classes = ["even", "odd", "neither"]  # type: ignore[attr-defined]
    loaded = load((items, Items(GOOD[:2])))
    assert (loaded.classes, loaded.class_names) == (3, ("even", "odd", "neither"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Endless(), "must have a length"),
        (Items([]), "there are no samples"),
        (Items([*GOOD, (torch.zeros(2), 0)]), "sample 0 has shape (3,), sample 10 has (2,)"),
        (Items([torch.zeros(3)] * 9), "samples must be (input, target); sample 0 has type Tensor"),
        (Items([(lambda: (torch.randn(3), 1)), *GOOD]), "sample 0 differs when it is read again"),
        (Items([(Image.new("L", (3, 3)), 0)] * 9), "PIL image"),
        (DataLoader(Items(GOOD)), "pass its Dataset instead"),
        ((Items(GOOD), Items([(torch.zeros(3), 7)])), "class 7, which no training sample has"),
        (TensorDataset(torch.zeros(9, 2)), "the TensorDataset has 1 tensors"),
    ],
)
def test_datasets_refused(value: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        load(value)
    assert said in str(caught.value)


def test_data_in_memory_are_known_in_this_process_only() -> None:
    with pytest.raises(DataError, match="only in the memory of the program that started this run"):
        data.load("in-memory:Nothing")


def test_limits_and_validation_hold_for_own_data(folder: Path) -> None:
    loaded = data.load(npz(folder, x=X[:45], y=Y[:45]), validation=10, train_limit=20, test_limit=5)
    assert loaded.validation is not None
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [20, 10, 5]
    with pytest.raises(ValueError, match="leaves none of the 36"):
        data.load("own.npz", validation=36)
