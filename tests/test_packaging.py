"""The package as a stranger gets it: wheel and sdist build, hold what they should, and work where they were installed."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

pytest.importorskip("hatchling", reason="building needs hatchling: pip install -e '.[dev]'")
pytestmark = pytest.mark.xdist_group("packaging")  # one process builds for all tests here


def run(*command: str | Path, folder: Path = ROOT, path: Path | None = None) -> str:
    """What a command prints, run by this Python in a folder; with `path` alone before what is installed."""
    environment = {key: value for key, value in os.environ.items() if path is None or key != "PYTHONPATH"}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel of a source tree; without the network."""
    run("-m", "pip", "wheel", source, "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was empty before the wheel was installed into it."""
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    return folder


def sources() -> set[str]:
    """The files of the packages, as a wheel names them."""
    found = (path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts and path.suffix != ".pyc"}


def without_metadata(names: Sequence[str]) -> set[str]:
    return {name for name in names if ".dist-info/" not in name}


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert without_metadata(names) == sources()
    assert {"apical/py.typed", "apical/evolution/teachers/digits.pt", "apical_papers/pfa/README.md"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"apical", "apical_papers", f"apical-{PROJECT['version']}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    about = email.message_from_bytes(archive.read(metadata))
    assert about["Requires-Python"] == PROJECT["requires-python"] == ">=3.11"
    assert about["License-Expression"] == "Apache-2.0"
    for page in ("README.md", "Makefile", "docs/start.md"):
        assert "Python 3.11 or newer" in (ROOT / page).read_text(encoding="utf-8")
    versions = [text.split()[-1] for text in about.get_all("Classifier", []) if re.search(r":: 3\.\d+$", text)]
    assert versions[0] == "3.11"


def test_a_wheel_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    run("-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO"} <= {path.name for path in source.iterdir()}
    assert packed.stat().st_size < 5e6, "results or figures are in it"
    again = build_wheel(source, tmp_path / "again")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_what_is_installed_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = run("-c", "import apical, apical_papers.pfa; print(apical.__file__)", folder=tmp_path, path=installed)
    assert Path(where.strip()).is_relative_to(installed)
    said = run("-m", "apical", "--version", folder=tmp_path, path=installed)
    assert said.strip() == f"apical {PROJECT['version']}"
    quick = ["--epochs", "1", "--seeds", "1", "--train-limit", "128", "--model", "mlp-8", "--jobs", "1", "--device", "cpu"]
    compare = ("compare", "--rules", "bp", "pfa-o", *quick, "--out", "out")
    run(installed / "bin" / "apical", *compare, folder=tmp_path, path=installed)
    assert (tmp_path / "out" / "report.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_uninstalling_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    """Not even what the command compiled when it ran."""
    venv.create(tmp_path / "new", with_pip=False)
    python = tmp_path / "new" / "bin" / "python"
    pip = ("-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check")
    before = {path for path in (tmp_path / "new").rglob("*") if "__pycache__" not in path.parts}
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel)
    (command,) = (tmp_path / "new" / "bin").glob("apical*")
    needed = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    said = subprocess.run([command, "--version"], cwd=tmp_path, env=needed, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == f"apical {PROJECT['version']}"
    assert len({path for path in (tmp_path / "new").rglob("*.py")} - before) > 300
    run(*pip, "uninstall", "--yes", "apical")
    assert {path for path in (tmp_path / "new").rglob("*") if "__pycache__" not in path.parts} == before
    assert not [path for path in (tmp_path / "new").rglob("*apical*")]


def test_the_citation_names_the_version_and_no_doi_that_does_not_exist() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {PROJECT['version']}\n" in text
    assert "doi" not in text, "add one here once the archive has given one"
