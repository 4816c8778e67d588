"""What is wrong with a command line, in one line, from what its parser prints in a box."""

import difflib
import re
from collections.abc import Iterable, Sequence


def explained(box: str, arguments: Sequence[str], commands: Iterable[str], options: Iterable[str]) -> str:
    """One sentence that names the option and what it takes.

    Args:
        box: what the parser prints.
        arguments: of the command line.
        commands: names of all commands.
        options: of the command given, as they are written ("--epochs N").

    >>> explained("Missing value for argument '--out'. Expected 1 values.", ["train", "--out"], ["train"], [])
    '--out needs a value; see apical train --help'
    """
    command = arguments[0] if arguments and arguments[0] in (known := list(commands)) else ""
    written = {each.split()[0]: each for each in options}
    see = f"; see apical {command} --help" if command else "; see apical --help"
    text = _plain(box)
    if found := re.search(r"Unrecognized options: (\S+?)(?:,|\s|$)", text):
        word = found[1]
        if not command:
            return f"unknown command {word!r}{_near(word, known)}. Commands: {', '.join(known)}"
        kind = "option" if word.startswith("-") else "word"
        return f"unknown {kind} {word}{_near(word, written)}{see}"
    if found := re.search(r"Missing value for argument '(\S+)'", text):
        return f"{found[1]} needs a value{see}"
    if found := re.search(r"Missing from apical[^:]*: (\S+(?: [A-Z|]+\b)?)", text):
        return f"{found[1]} is missing{see}"
    if found := re.search(r"invalid choice '(.*?)' for argument '(\S+)'\. Expected one of \((.*?)\)", text):
        choices = [choice for choice in re.findall(r"'(.*?)'", found[3]) if choice != "None"]
        return f"{found[2]} is {found[1]!r}{_near(found[1], choices)}, but takes {', '.join(sorted(choices))}"
    if found := re.search(r"Error parsing (\S+): (.*)", text):
        values = re.findall(r"\['(.*?)'\]", found[2]) or re.findall(r": '(.*?)'", found[2])
        what = "a whole number" if "INT" in found[2] or "int()" in found[2] else "numbers" if "FLOAT" in found[2] else ""
        got = f", got {values[0]!r}" if values else ""
        return f"{written.get(found[1], found[1])} takes {what or 'another kind of value'}{got}{see}"
    return f"{text}{see}"


def _plain(box: str) -> str:
    """The text before the first line across the box."""
    lines = []
    for line in box.splitlines():
        inner = re.sub("^[│┃] ?| ?[│┃]$", "", re.sub("\x1b\\[[0-9;]*m", "", line).rstrip()).strip()
        if inner.startswith(("╭", "╰")):
            continue
        if inner.startswith("──"):
            break
        lines.append(inner)
    return " ".join(" ".join(lines).split())


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""
