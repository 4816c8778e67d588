"""Who may import whom, from the source: errors < core < rules < bench < papers < cli, and the sides; and how files lie."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
LIBRARY = {"core", "errors"}
SIDES = {"diagnostics", "models", "data", "evolution", "optim"}
ROOMS = {
    "errors": set(),
    "core": LIBRARY,
    "rules": LIBRARY | {"rules"},
    "own_code": {"errors"},
    "models": LIBRARY | {"models", "own_code"},
    "data": {"data", "errors", "own_code"},
    "diagnostics": LIBRARY | {"diagnostics", "rules"},
    "evolution": LIBRARY | {"evolution", "rules", "models", "data"},
    "optim": {"errors", "optim"},
    "testing": LIBRARY | {"testing", "rules"},
    "bench": LIBRARY | SIDES | {"bench", "rules", "own_code"},
    "papers": LIBRARY | SIDES | {"papers", "bench", "rules"},
    "cli": LIBRARY | SIDES | {"cli", "bench", "rules", "columns", "own_code"},  # papers are found by their entry points
}
"""What the files of each room may import."""


OUTSIDE = {"torch", "numpy", "sklearn", "pooch", "rich", "requests", "PIL"}  # what core, rules and the sides may use
EXTRAS = {"ray", "evotorch"}  # evolution too


def room(module: str) -> str:
    """The room of a module.

    >>> room("apical.core.edge"), room("apical_papers.pfa.theory"), room("apical")
    ('core', 'papers', 'apical')
    """
    first, *rest = module.split(".")
    return "papers" if first == "apical_papers" else rest[0] if rest else first


def name_of(path: Path) -> str:
    """The module that a file is."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def imports(path: Path, loaded: bool = False) -> set[str]:
    """Modules that a file imports; `from apical import data` is apical.data.

    Args:
        path: the file.
        loaded: only those that importing the file loads: not in functions, not for type checkers.
    """
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in full}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms(path: Path) -> None:
    here, used = room(name_of(path)), imports(path)
    ours = {room(name) for name in used if name.split(".")[0] in ("apical", "apical_papers")}
    assert ours - {"apical"} <= ROOMS.get(here, ours), "imports from a room that it must not know"
    if here not in ("bench", "papers", "cli"):
        others = {name.split(".")[0] for name in used} - set(sys.stdlib_module_names) - {"apical"}
        assert others <= OUTSIDE | (EXTRAS if here == "evolution" else {"hypothesis"} if here == "testing" else set())
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, "longer than 500 lines"


@pytest.mark.parametrize("path", sorted((SOURCE / "apical/rules").rglob("*.py")), ids=lambda path: path.stem)
def test_a_rule_imports_no_other_rule(path: Path) -> None:
    family = name_of(path).split(".")[:3] if path.parent.name != "rules" else None
    for used in imports(path):
        if used.startswith("apical.rules."):
            assert family is not None
            assert used.split(".")[:3] == family, f"{used} is another rule's"


def test_folders_not_prefixes() -> None:
    for folder in {path.parent for path in FILES}:
        stems = [path.stem for path in folder.glob("*.py") if "_" in path.stem and not path.stem.startswith("_")]
        prefixes = Counter(stem.split("_")[0] for stem in stems)
        assert max(prefixes.values(), default=0) < 3, f"three files with one prefix in {folder.relative_to(SOURCE)}"


def test_files_are_short() -> None:
    lengths = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES if path.name != "__init__.py")
    assert lengths[len(lengths) // 2] <= 150, "the median file is longer than 150 lines"


def closure(module: str) -> set[str]:
    """A module and all of ours that it imports, at any remove; packages without content do not count."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        path = SOURCE / f"{name.replace('.', '/')}.py"
        todo += imports(path if path.exists() else SOURCE / name.replace(".", "/") / "__init__.py", loaded=True)
    return {name for name in seen if (SOURCE / f"{name.replace('.', '/')}.py").exists()}


@pytest.mark.parametrize(
    ("module", "files"),
    [
        ("apical.rules.feedback_alignment", 16),
        ("apical.rules.feedback_control.deep_feedback_control", 22),
        ("apical.rules.equilibrium.equilibrium_propagation", 23),
    ],
)
def test_what_a_rule_needs(module: str, files: int) -> None:
    needed = closure(module)
    lines = sum(len((SOURCE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8").splitlines()) for name in needed)
    print(f"{module}: {len(needed)} files, {lines} lines")
    assert len(needed) <= files
