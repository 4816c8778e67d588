"""The picture of how far credit arrives: rules against kinds and depths of chains, from the kept studies of depth."""

import math
import re
from html import escape
from pathlib import Path

from tables import load

STUDIES = ("structure-study", "structure-depth")
TITLE = "Gradient norm of layer 1 over that of the last hidden layer: "
CELL, ROW, NAMES, TOP = 21, 15, 104, 46
DEEP = 12
"""Orders of magnitude at which the colour is full."""
SIGNS = {"refused": "·", "not finite": "∞"}

Ratios = dict[str, dict[tuple[str, str], str]]
"""Rule, then network and depth, to what a table of a study says."""


def ratios(root: Path) -> Ratios:
    """All that the studies have."""
    found: Ratios = {}
    for study in STUDIES:
        for part in (load(root / "results" / study / "results.json") or {"tables": []})["tables"]:
            if part["title"].startswith(TITLE):
                network, depths = part["title"].removeprefix(TITLE), part["header"][1:]
                for rule, *cells in part["rows"]:
                    found.setdefault(rule, {}).update({(network, d): cell for d, cell in zip(depths, cells, strict=True)})
    return found


def orders(cell: str) -> float | None:
    """Orders of magnitude gained from the last layer to the first, minus infinity if nothing arrives; None for no number.

    >>> orders("0.01 (0.001 to 0.1)"), orders("0"), orders("refused")
    (-2.0, -inf, None)
    """
    number = re.match(r"[\d.e+-]+(?= \(|$)", cell)
    if number is None:
        return None
    value = float(number[0])
    return math.log10(value) if value > 0 else -math.inf


def look(cell: str) -> tuple[str, str, str]:
    """Colours of a cell and its sign: blue for what vanishes, red for what grows, and the rounded orders of magnitude."""
    power = orders(cell)
    if power is None:
        return "none", "currentColor", SIGNS.get(cell, "-")
    share = min(abs(power) / DEEP, 1.0) ** 0.6
    tone = "0, 114, 178" if power < 0 else "213, 94, 0"
    sign = "\u00d7" if math.isinf(power) else f"{round(power)}".replace("-", "\u2212")
    return f"rgba({tone}, {share:.2f})", "white" if share > 0.7 else "currentColor", sign


def picture(root: Path) -> str:
    """The SVG, whose texts take the page's colour; empty where no study is kept."""
    rows = ratios(root)
    if not rows:
        return ""
    columns = list(dict.fromkeys(place for cells in rows.values() for place in cells))
    networks = list(dict.fromkeys(network for network, _ in columns))
    width, height = NAMES + CELL * len(columns) + 6 * len(networks), TOP + ROW * len(rows) + 4
    lefts = {place: NAMES + CELL * i + 6 * networks.index(place[0]) for i, place in enumerate(columns)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="depths" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" font-size="9" fill="currentColor">',
        "<title>Orders of magnitude between the credit of the last hidden layer and that of the first</title>",
    ]
    for network in networks:
        places = [lefts[place] for place in columns if place[0] == network]
        middle = (places[0] + places[-1] + CELL) / 2
        for line, words in enumerate(network.split(", ")):
            parts.append(_text(middle, 10 + 11 * line, words))
    parts += [_text(left + CELL / 2, TOP - 6, depth.removeprefix("depth ")) for (_, depth), left in lefts.items()]
    for i, (rule, cells) in enumerate(rows.items()):
        y = TOP + ROW * i
        parts.append(_text(NAMES - 6, y + 11, rule, "end"))
        for place, cell in cells.items():
            colour, ink, sign = look(cell)
            box = f'<rect x="{lefts[place]}" y="{y}" width="{CELL - 1}" height="{ROW - 1}" style="fill: {colour}"/>'
            hint = f"<title>{escape(f'{rule}, {place[0]}, {place[1]}: {cell}')}</title>"
            parts.append(f'<g fill="{ink}">{hint}{box}{_text(lefts[place] + CELL / 2 - 0.5, y + 10.5, sign)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
