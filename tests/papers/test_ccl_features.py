"""The pictures of features: what is written, reproducibly, and what is refused."""

import json
from pathlib import Path

import pytest

from apical_papers.ccl import features as ccl_features

SMALL = ["--model", "mlp-elu-8-8", "--updates", "0", "5", "--samples", "60"]


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_pictures_and_their_numbers_are_written(tmp_path: Path, method: str) -> None:
    found = []
    for name in ("one", "two"):
        assert ccl_features.main(["--out", str(tmp_path / name), "--method", method, *SMALL]) == 0
        assert (tmp_path / name / "features.png").read_bytes().startswith(b"\x89PNG")
        found.append(json.loads((tmp_path / name / "results.json").read_text())["cka"])
    assert found[0] == found[1]
    assert list(found[0]) == ["0", "5"]
    assert all(0 <= value <= 1 for panels in found[0].values() for value in panels.values())
    assert found[0]["0"] != found[0]["5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--updates", "5", "5"], "must be increasing"), (["--data", "student-teacher"], "are numbers")],
)
def test_bad_options_are_refused(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ccl_features.main(["--out", str(tmp_path / "x"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
