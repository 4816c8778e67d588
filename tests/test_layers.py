"""Who may import whom, from the source: errors < core < dynamics < rules < experiment < recipes < cli, and the sides."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "apical"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    "errors": set(),
    "own_code": {"errors"},
    "core": {"core", "errors"},
    "dynamics": {"dynamics", "core", "errors"},
    "rules": {"dynamics", "core", "errors"},  # and never another rule
    "models": {"models", "core", "own_code", "errors"},
    "data": {"data", "own_code", "errors"},
    "diagnostics": {"diagnostics", "dynamics", "core", "errors"},
    "evolution": {"evolution", "rules", "models", "data", "dynamics", "core", "errors"},
    "testing": {"testing", "rules", "dynamics", "core", "errors"},
    "experiment": {"experiment", "evolution", "diagnostics", "models", "data", "dynamics", "core", "errors"},
    "recipes": {
        "recipes",
        "experiment",
        "evolution",
        "diagnostics",
        "models",
        "data",
        "rules",
        "dynamics",
        "core",
        "own_code",
        "errors",
    },
}
OUTSIDE = {"torch", "numpy", "sklearn", "pooch", "rich", "requests", "PIL"}  # what core, rules and the sides may use
EXTRAS = {"ray", "evotorch", "gymnasium"}  # evolution too


def imports(path: Path) -> set[str]:
    """Modules that a file imports; `from apical import data` is apical.data."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"apical.{alias.name}" for alias in node.names} if node.module == "apical" else {str(node.module)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = imports(path)
    ours = {name.split(".")[1] for name in used if name.startswith("apical.")}
    assert ours <= LAYERS.get(layer, ours), "imports from a layer that it must not know"
    if layer not in ("experiment", "recipes", "cli", "commands", "flags"):
        others = {name.split(".")[0] for name in used} - set(sys.stdlib_module_names) - {"apical"}
        assert others <= OUTSIDE | (EXTRAS if layer == "evolution" else {"hypothesis"} if layer == "testing" else set())
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, "longer than 400 lines"
