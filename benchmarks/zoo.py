"""Which rule trains which model: every rule on every model of `benchmarks/specimens`, by intervention.

    python benchmarks/zoo.py [--out benchmarks/zoo.json] [--rules fa dfa] [--compiled fa dfa]

For each pair `apical.testing.check_model` runs in double precision, and its result is saved: the checks that passed, the
message of a refusal, or the fault. Compilation takes ten seconds per model, so by default only one rule of each kind,
feedback edges and cuts, is compiled.
"""

import argparse
import inspect
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import apical
from apical.bench.names import RULES, Entry
from apical.core.credit import Loss
from apical.testing.model import CHECKS
from run import environment, save
from specimens import ZOO, outcome


def made(entry: Entry, shape: tuple[int, ...], model: nn.Module, loss: Loss) -> apical.CreditRule:
    """Return the rule for a model and samples of a shape."""
    sized = {"input_shape": shape} if "input_shape" in inspect.signature(entry.build).parameters else {}
    return entry.build(model, loss=loss, **sized, **entry.options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "zoo.json")
    parser.add_argument("--rules", nargs="*", choices=list(RULES), default=list(RULES))
    parser.add_argument("--compiled", nargs="*", choices=list(RULES), default=["fa", "dfa"], help="rules to compile too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for rule in options.rules:
        for name, specimen in ZOO.items():
            shape = tuple(specimen.inputs(torch.Generator()).shape[1:])
            skip = () if rule in options.compiled else ("compiled",)
            result = outcome(partial(made, RULES[rule], shape), specimen, skip)
            rows.append({"rule": rule, "model": name, **asdict(result)})
            print(rule, name, "trained" if result.trained else result.refused or f"FAULT: {result.fault}", flush=True)
    content = {
        "models": {name: specimen.title for name, specimen in ZOO.items()},
        "checks": {name: " ".join((check.__doc__ or "").split()) for name, check in CHECKS.items()},
        "compiled": options.compiled,
        "rows": rows,
        "seconds": round(time.perf_counter() - begun, 1),
        "environment": environment(torch.device("cpu")),
    }
    save(options.out, content)


if __name__ == "__main__":
    main()
