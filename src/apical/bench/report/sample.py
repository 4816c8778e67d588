"""Text that a trained net goes on with: kept in sample.json of a run folder, and shown in reports."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch

from apical.bench.report.placement import first_file
from apical.bench.schedule import generator
from apical.bench.state import read_json, write_state
from apical.core.credit import CreditRule
from apical.core.rest import evaluating
from apical.data import Dataset
from apical.data.text.sequences import decoded
from apical.diagnostics.alignment import unchanged
from apical.errors import CheckpointError

FILE = "sample.json"
LENGTH = 300
"""Tokens that are drawn."""


@torch.no_grad()
def keep(folder: Path, rule: CreditRule, dataset: Dataset) -> None:
    """Write how the rule's net goes on behind the first window of test text into its run folder; nothing of other data.

    Each token is drawn from the net's distribution, always with the same random numbers, and joins the window.
    """
    if not dataset.is_text:
        return
    window = dataset.test.inputs[:1]
    prompt, draw = window[0].tolist(), generator("cpu", 0, "sample")
    tokens: list[int] = []
    with unchanged(rule), evaluating(rule):
        for _ in range(LENGTH):
            chances = rule.answer(window)[0, -1].double().softmax(-1).cpu()
            tokens.append(int(torch.multinomial(chances, 1, generator=draw)))
            window = torch.cat((window[:, 1:], window.new_tensor([[tokens[-1]]])), dim=1)
    names = dataset.class_names
    write_state(folder / FILE, {"begun": decoded(prompt, names), "drawn": decoded(tokens, names)})


def section(out: Path, rules: Sequence[str]) -> str:
    """What the nets of a run folder or of a compare folder's rules wrote, as HTML; empty where no run has kept any.

    Raises:
        CheckpointError: a file is damaged.
    """
    parts = []
    for rule in rules:
        if path := first_file(out, rule, FILE):
            prompt, sequel = _read(path)
            text = f"<mark>{escape(prompt)}</mark>{escape(sequel)}"
            parts.append(f"<details><summary><b>{escape(rule)}</b></summary><pre>{text}</pre></details>")
    note = "Behind the marked beginning, which is test text, each token was drawn from what the trained net expects."
    return "\n".join(["<h2>What the nets write</h2>", f'<p class="note">{note}</p>', *parts]) if parts else ""


def _read(path: Path) -> tuple[str, str]:
    content = read_json(path)
    prompt, sequel = content.get("begun"), content.get("drawn")
    if not isinstance(prompt, str) or not isinstance(sequel, str):
        raise CheckpointError(f"{path} is damaged: it has no text")
    return prompt, sequel
