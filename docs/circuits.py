"""Drawings of who sends what to whom under each rule, as SVG, from the descriptions in circuits.toml."""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from tables import toml

WIDTH, STEP, ROW, LEFT, TOP, RADIUS = 360, 74, 74, 32, 40, 15
KINDS = {
    "w": ("forward weights", "circuit-forward", "currentColor", ""),
    "b": ("feedback weights", "circuit-feedback", "#0072b2", "7 3"),
    "s": ("error, target, state", "circuit-signal", "#c04f00", "2 3"),
    "t": ("teacher", "circuit-teacher", "#9b2c7a", "9 3 2 3"),
}
"""Kind of arrow -> what it is, its colour's name in the style sheet, the colour without one, and its dashes."""
ARROW = re.compile(r"(\S+) > (\S+) ([wbst])(?: ([^@]*?))?(?: ?@(-?\d+))?$")


class Circuit(NamedTuple):
    """One drawing."""

    nodes: Sequence[str]
    arrows: Sequence[str]
    notes: Sequence[str]
    caption: str


class Point(NamedTuple):
    x: float
    y: float


def circuits() -> dict[str, Circuit]:
    """The drawing of each rule, by the name of its page."""
    known = toml("circuits")
    return {page: _circuit(rule, known["shapes"]) for page, rule in known["rules"].items()}


def _circuit(rule: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Any]]) -> Circuit:
    parts = [rule]
    while base := parts[0].get("shape") or parts[0].get("on"):
        parts.insert(0, shapes[base])

    def joined(key: str) -> list[str]:
        return [each.format(**rule.get("fill", {})).strip() for part in parts for each in part.get(key, ())]

    return Circuit(joined("nodes"), joined("arrows"), joined("notes"), rule["caption"])


def drawing(circuit: Circuit) -> str:
    """The SVG. Its texts and forward arrows take the page's colour; others have variables that a dark theme may set."""
    places, shapes = {}, []
    for node in circuit.nodes:
        key, label, column, row = node.split()
        places[key] = _place(column, row)
        shapes.append(_node(places[key], label))
    arrows, depths = zip(*(_arrow(places, each) for each in circuit.arrows), strict=True)
    texts = [(_place(column, row), text) for column, row, text in (note.split(" ", 2) for note in circuit.notes)]
    notes = [_text(at, text, "middle") for at, text in texts]
    bottom = max(*depths, *(point.y + RADIUS for point in places.values()), *(at.y + 6 for at, _ in texts))
    kinds = [kind for kind in KINDS if any(ARROW.fullmatch(each)[3] == kind for each in circuit.arrows)]  # type: ignore[index]
    legend = [_legend(i, kind, bottom + 24) for i, kind in enumerate(kinds)]
    height = bottom + 18 + 20 * ((len(kinds) + 1) // 2)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="circuit" viewBox="0 0 {WIDTH} {height:g}" role="img" '
            f'font-family="sans-serif" font-size="12.5" fill="none" stroke-width="1.5">',
            f"<title>{escape(circuit.caption)}</title>",
            *arrows,
            *shapes,
            *notes,
            *legend,
            "</svg>\n",
        ]
    )


def _place(column: str, row: str) -> Point:
    return Point(LEFT + STEP * float(column), TOP + ROW * float(row))


def _half(label: str) -> float:
    """Half the width of a node."""
    return max(RADIUS, 4 * len(label) + 5)


def _node(at: Point, label: str) -> str:
    half = _half(label)
    box = f'<rect x="{at.x - half:g}" y="{at.y - RADIUS}" width="{2 * half:g}" height="{2 * RADIUS}" rx="{RADIUS}" '
    return f'{box}stroke="currentColor"/>{_text(Point(at.x, at.y + 4.5), label, "middle")}'


def _text(at: Point, text: str, anchor: str) -> str:
    place = f'x="{at.x:.1f}" y="{at.y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="currentColor" stroke="none">{escape(text)}</text>'


def _style(kind: str) -> tuple[str, str]:
    """The colour of a kind of arrow, and the attributes of its line."""
    _, name, colour, dashes = KINDS[kind]
    colour = f"var(--{name}, {colour})"
    return colour, f'style="stroke: {colour}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def _head(tip: Point, direction: Point, colour: str) -> str:
    """A triangle at `tip`, along a unit vector."""
    x, y = tip.x - 7 * direction.x, tip.y - 7 * direction.y
    ends = f"{x - 3.5 * direction.y:.1f},{y + 3.5 * direction.x:.1f} {x + 3.5 * direction.y:.1f},{y - 3.5 * direction.x:.1f}"
    return f'<polygon points="{tip.x:.1f},{tip.y:.1f} {ends}" style="fill: {colour}"/>'


def _towards(a: Point, b: Point, length: float = 1.0) -> Point:
    """The vector of a length from `a` to `b`."""
    distance = math.hypot(b.x - a.x, b.y - a.y)
    return Point(length * (b.x - a.x) / distance, length * (b.y - a.y) / distance)


def _arrow(places: Mapping[str, Point], arrow: str) -> tuple[str, float]:
    """Line, head, and label, on the side to which the line bends or, after "!", on the other; and their lowest y."""
    found = ARROW.fullmatch(arrow)
    if found is None:
        raise ValueError(f"circuits.toml: {arrow!r} is no arrow")
    source, target, kind, label, bend = found.groups()
    a, b, offset = places[source], places[target], float(bend or 0)
    colour, style = _style(kind)
    if source == target:
        line = f'<path d="M{a.x - 8:g} {a.y - 14:g} c-8 -24 24 -24 16 -2" {style}/>'
        return line + _head(Point(a.x + 7, a.y - 14), Point(-0.32, 0.95), colour), a.y
    along = _towards(a, b)
    side = Point(along.y, -along.x)  # to the left of who walks along the arrow; y grows downwards
    control = Point((a.x + b.x) / 2 - 2 * offset * side.x, (a.y + b.y) / 2 - 2 * offset * side.y)
    out, into, end = _towards(a, control, RADIUS + 2), _towards(control, b, RADIUS + 2), _towards(control, b, RADIUS + 7)
    start, tip, stop = Point(a.x + out.x, a.y + out.y), Point(b.x - into.x, b.y - into.y), Point(b.x - end.x, b.y - end.y)
    line = f'<path d="M{start.x:.1f} {start.y:.1f} Q{control.x:.1f} {control.y:.1f} {stop.x:.1f} {stop.y:.1f}" {style}/>'
    line += _head(tip, _towards(control, b), colour)
    x, y = (start.x + 2 * control.x + tip.x) / 4, (start.y + 2 * control.y + tip.y) / 4  # the middle of the curve
    if not label:
        return line, y
    away = (6 if abs(side.x) > 0.3 else 9) * (-1 if label.startswith("!") != (offset > 0) else 1)
    anchor = "middle" if abs(side.x) <= 0.3 else "start" if away * side.x > 0 else "end"
    return line + _text(Point(x + away * side.x, y + away * side.y + 4.5), label.lstrip("!"), anchor), y + 9


def _legend(i: int, kind: str, y: float) -> str:
    """One line of the legend: two stand side by side."""
    x, y = 12 + 172 * (i % 2), y + 20 * (i // 2)
    colour, style = _style(kind)
    line = f'<path d="M{x} {y:g} h28" {style}/>{_head(Point(x + 36, y), Point(1, 0), colour)}'
    return line + _text(Point(x + 44, y + 4.5), KINDS[kind][0], "start")
