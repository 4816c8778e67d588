"""What is kept of a folder of results: every number hashed and summed, the most telling ones as they are.

Numbers and texts are hashed apart, so that a reworded line is not taken for another result. What differs between two equal
runs (times, memory, paths, commits) is left out, and module names are cut to their last part, so that moves do not show.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOLATILE = {
    *("command", "commit", "cpu", "cpu_seconds", "device", "environment", "evolution", "feedback_ms_per_step", "jobs"),
    "memory_mb",
    *("ms_per_step", "out", "peak_memory_mb", "platform", "ratio_to_bp", "seconds", "sha256", "started", "threads"),
}
"""Names of what may differ between two runs that give the same; "evolution" is the length of one in seconds."""

TIME = re.compile(r"seconds|s per generation|\bcommits?\b")
"""In names of times, of columns of them, of what verdicts on them are about, and of the commits at which parts were made."""

IGNORED = {"environment.json", "result.json"}
"""Files that hold nothing else, or only what the run's metrics and summary.json have too."""

MODULE = re.compile(r"\bapical(?:_\w+)?(?:\.\w+)+")

Summary = dict[str, Any]


def folder(path: Path) -> dict[str, Summary]:
    """A summary of every file of results under a folder, by its path in it.

    Raises:
        FileNotFoundError: there is none.
    """
    found = {str(file.relative_to(path)): summary(content) for file in sorted(path.rglob("*")) for content in _read(file)}
    if not found:
        raise FileNotFoundError(f"{path} holds no results")
    return found


def summary(content: Any) -> Summary:
    """Hashes and sum of what is in `content`, with its last record's own fractions and its verdicts, if it has any.

    >>> made = summary([{"epoch": 1, "loss": 0.5, "seconds": 3.0}])
    >>> made["sum"], made["last"]
    (1.5, {'loss': 0.5})
    """
    numbers, texts = [], []
    for leaf in _leaves(content):
        (texts if isinstance(leaf, str) else numbers).append(leaf)
    made: Summary = {"numbers": _hash(map(repr, numbers), 12), "texts": _hash(texts, 8)}
    if not _has_tensors(content):  # whose hashes are among the numbers
        made["sum"] = math.fsum(x for x in numbers if isinstance(x, int | float) and math.isfinite(x))
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        made["last"] = {k: v for k, v in content[-1].items() if k not in VOLATILE and isinstance(v, float)}
    if isinstance(content, dict) and isinstance(content.get("verdicts"), list):
        made["verdicts"] = [_verdict(row) for row in content["verdicts"] if not TIME.search(str(row["what"]))]
    return made


def _has_tensors(content: Any) -> bool:
    inner = content.values() if isinstance(content, Mapping) else content if isinstance(content, list | tuple) else ()
    return isinstance(content, torch.Tensor) or any(map(_has_tensors, inner))


def _verdict(row: Mapping[str, Any]) -> list[Any]:
    return [
        MODULE.sub(_last, value) if isinstance(value, str) else value for key, value in row.items() if key not in VOLATILE
    ]


def _read(file: Path) -> Iterator[Any]:
    """What the file holds; nothing for a file that is no result, such as a figure."""
    if file.name in IGNORED:
        return
    if file.suffix == ".json":
        yield json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".jsonl":
        yield [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    elif file.suffix == ".npz":
        with np.load(file) as arrays:
            yield [torch.from_numpy(arrays[name]) for name in sorted(arrays)]
    elif file.suffix == ".pt":
        content = torch.load(file, map_location="cpu", weights_only=True)
        for other in ("python", "numpy"):  # of which nothing here draws
            content.get("rng", {}).pop(other, None)
        yield content


def _leaves(content: Any) -> Iterator[Any]:
    """Numbers, and texts, among them the names of entries; a tensor is a number made of its hash, its shape and its sum."""
    if isinstance(content, Mapping):
        if TIME.search(str(content.get("what"))):
            return
        if {"header", "rows"} <= content.keys():
            kept = [i for i, name in enumerate(content["header"]) if not TIME.search(name)]
            content = {**content, "rows": [[row[i] for i in kept] for row in content["rows"]]}
        for key, value in content.items():
            if key not in VOLATILE and not TIME.search(str(key)):
                yield f"{key}:"
                yield from _leaves(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _leaves(value)
    elif isinstance(content, torch.Tensor):
        plain = content.detach().contiguous()
        yield int(hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy()).hexdigest()[:8], 16)
        yield from plain.shape
        yield float(plain.double().nan_to_num(0, 0, 0).sum())
    elif isinstance(content, str) and content.startswith("{"):  # JSON in a text, as teachers have it
        yield from _leaves(json.loads(content))
    elif isinstance(content, str):
        yield MODULE.sub(_last, content)
    elif content is None or isinstance(content, bool | int | float):
        yield content
    else:
        yield str(content)


def _last(found: re.Match[str]) -> str:
    return found[0].rpartition(".")[2]


def _hash(parts: Any, length: int) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:length]
