"""Where each layer's error comes from: a table, found by running the model once and leaving everything as it was."""

import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apical.core.layers import is_local
from apical.core.processes import is_parted
from apical.core.rest import undisturbed
from apical.errors import ConfigError

OUTPUT_CREDIT = "the output's credit"
"""Path of what lies behind the last cuts of a rule that hands out a credit for the output, too."""

LOCAL_PATH = "exact (local)"
"""Path of modules that hand nothing from one population to another: scales, shifts, slopes, look-ups."""
_WIDTHS = (32, 20, 20, 44)


@dataclass(frozen=True)
class Row:
    """One module with parameters.

    Attributes:
        layer: name of the module; "" is the model itself.
        kind: its class.
        shape: of its weight, or of its first parameter where it has no `weight`.
        path: what its error passes through: "own feedback", "cut at 'NAME'", "exact", "merged with 'NAME'", "frozen", "no
            credit", "signal of its own", "the output's credit", "exact (local)", or a few words of the rule's.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    path: str


class Placement(tuple[Row, ...]):
    """Rows in the order in which the model registers its modules; prints as an aligned table.

    >>> print(Placement([Row("0", "Linear", (5, 4), "own feedback"), Row("2", "LayerNorm", (5,), "exact (local)")]))
    layer  type       weight  error passes through
    0      Linear     5x4     own feedback
    2      LayerNorm  5       exact (local)
    """

    __slots__ = ()

    def __str__(self) -> str:
        header = ("layer", "type", "weight", "error passes through")
        lines = [header, *((row.layer or "(model)", row.kind, "x".join(map(str, row.shape)), row.path) for row in self)]
        widths = [min(most, max(map(len, column))) for most, column in zip(_WIDTHS, zip(*lines, strict=True), strict=True)]
        text = []
        for line in lines:
            cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(line, widths, strict=True)]
            for i in range(max(map(len, cells))):
                parts = [(cell[i] if i < len(cell) else "").ljust(width) for cell, width in zip(cells, widths, strict=True)]
                text.append("  ".join(parts).rstrip())
        return "\n".join(text)

    __repr__ = __str__

    def path(self, layer: str) -> str:
        """Return what the error of one layer passes through.

        Raises:
            KeyError: no such row.
        """
        for row in self:
            if row.layer == layer:
                return row.path
        raise KeyError(layer)

    def layers(self) -> str:
        """Return the names of the modules by path, in a line.

        >>> Placement([Row("0", "Linear", (5, 4), "exact"), Row("2", "Linear", (5, 5), "exact")]).layers()
        'exact: 0, 2'
        """
        paths: dict[str, list[str]] = {}
        for row in self:
            paths.setdefault(row.path, []).append(row.layer or "(model)")
        return "; ".join(f"{path}: {', '.join(names)}" for path, names in paths.items())

    def summary(self) -> str:
        """Return how many modules have which path, in a line.

        >>> Placement([Row("0", "Linear", (5, 4), "cut at '1'"), Row("2", "Linear", (5, 5), "cut at '3'")]).summary()
        '2 cut'
        """
        return path_summary(row.path for row in self)


def path_summary(paths: Iterable[str]) -> str:
    """Return how many paths there are of each kind, whatever module they name.

    >>> path_summary(["cut at '1'", "cut at '3'", "exact"])
    '2 cut, 1 exact'
    """
    kinds = Counter(path.split(" at '")[0].split(" with '")[0] for path in paths)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.items())


def place(model: nn.Module, paths: Mapping[str, str]) -> Placement:
    """Return a model's table from the paths of its weighted layers; other modules with parameters are exact and local."""
    rows = []
    modules = _modules(model)
    parts: dict[str, dict[str, None]] = {}  # of modules with several weights
    for name, path in paths.items():
        if name not in modules:
            parts.setdefault(name.rpartition(".")[0], {})[path] = None
    for name, (module, own) in modules.items():
        path = LOCAL_PATH if any(q.requires_grad for q in own.values()) else "frozen"
        path = paths.get(name, ", ".join(parts.get(name, ())) or path)
        kind = type(module).__name__.removeprefix("Parametrized")
        weight = getattr(module, "weight", None)
        first = next(iter(own.values()))
        rows.append(Row(name, kind, tuple((weight if isinstance(weight, Tensor) else first).shape), path))
    return Placement(rows)


def require_whole(model: nn.Module) -> None:
    """Refuse a model of whose parameters each process holds a part: only the wrapper's own forward pass puts them together.

    Raises:
        ConfigError: it is under `fully_shard`.
    """
    if any(map(is_parted, model.parameters())):
        raise ConfigError("each process holds a part of the parameters (fully_shard): look at the rule before it is wrapped")


def layer_paths(model: nn.Module, inputs: Any, path: str, exact: Collection[str] = ()) -> dict[str, str]:
    """Return `path` for every weighted layer, except where a layer is frozen, or where the output does not depend on it.

    Layers named in `exact` have the path "exact" in its place.

    Any module with parameters that is not local (:func:`apical.core.layers.is_local`) counts as weighted.
    """
    modules = {name: own for name, (module, own) in _modules(model).items() if not is_local(module)}
    reached = _reached(model, [q for own in modules.values() for q in own.values() if q.requires_grad], inputs)
    paths = {}
    for name, own in modules.items():
        trained = [id(q) for q in own.values() if q.requires_grad]
        own_path = "exact" if name in exact else path
        paths[name] = (own_path if any(i in reached for i in trained) else "no credit") if trained else "frozen"
    return paths


def _reached(model: nn.Module, parameters: list[nn.Parameter], inputs: Any) -> set[int]:
    """Return ids of the parameters that the output depends on: as the modules are now or, failing that, in evaluation."""
    reached: set[int] = set()
    for mode in (None, False):
        with torch.enable_grad(), undisturbed(model):
            if mode is not None:
                model.train(mode)
            output = model(inputs)
            total = [x.abs().sum() for x in _tensors(output, set()) if x.requires_grad]
            if total:
                start = torch.stack([t.to(total[0].device, torch.float64) for t in total]).sum()
                grads = torch.autograd.grad(start, parameters, allow_unused=True)
                reached |= {id(q) for q, g in zip(parameters, grads, strict=True) if g is not None}
        if len(reached) == len(set(map(id, parameters))):
            break
    return reached


def _tensors(output: Any, seen: set[int]) -> Iterator[Tensor]:
    """Return the tensors in an output of any kind, also in objects of a user's."""
    if isinstance(output, Tensor):
        yield output
    elif not isinstance(output, type | nn.Module | str) and id(output) not in seen:
        seen.add(id(output))
        named = fields(output) if is_dataclass(output) else ()
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
        for part in (*parts, *(getattr(output, each.name) for each in named), *getattr(output, "__dict__", {}).values()):
            yield from _tensors(part, seen)


def _modules(model: nn.Module) -> dict[str, tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Return each module that holds parameters itself, by name."""
    modules = {}
    for name, module in model.named_modules():
        own = {} if "parametrizations" in name.split(".") else _own_parameters(module)
        if own:
            modules[name] = (module, own)
    return modules


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module by name, the weight first; those of a parametrisation count as the module's."""
    own = dict(module.named_parameters(recurse=False))
    if "parametrizations" in module._modules:
        own |= dict(module.get_submodule("parametrizations").named_parameters())
    return dict(sorted(own.items(), key=lambda item: "weight" not in item[0]))
