"""One-line messages for invalid command lines, extracted from the box that the parser prints."""

import difflib
import re
from collections.abc import Iterable, Sequence


def explained(box: str, arguments: Sequence[str], commands: Iterable[str], options: Iterable[str]) -> str:
    """Return one sentence that names the option and what it takes.

    Args:
        arguments: of the command line.
        options: of the command given, as they are written ("--epochs N").

    >>> explained("Missing value for argument '--out'. Expected 1 values.", ["train", "--out"], ["train"], [])
    '--out needs a value; see apical train --help'
    >>> explained("Missing value for argument '('--out',)'.", ["train", "--out"], ["train"], [])  # older versions of tyro
    '--out needs a value; see apical train --help'
    """
    command = arguments[0] if arguments and arguments[0] in (names := list(commands)) else ""
    written = {option.split()[0]: option for option in options}
    see = f"; see apical {command} --help" if command else "; see apical --help"
    text = _plain(box)
    if match := re.search(r"Unrecognized (?:or misplaced )?options: (\S+?)(?:,|\s|$)", text):
        word = match[1]
        if not command:
            return f"unknown command {word!r}{_near(word, names)}. Commands: {', '.join(names)}"
        kind = "option" if word.startswith("-") else "word"
        return f"unknown {kind} {word}{_near(word, written)}{see}"
    if match := re.search(r"Missing value for argument '\W*?(-*\w\S*?)[',)]", text):
        return f"{match[1]} needs a value{see}"
    if match := re.search(r"Missing from apical[^:]*: (\S+(?: [A-Z|]+\b)?)", text):
        return f"{match[1]} is missing{see}"
    if match := re.search(r"Expected one of \{(.*?)\}", text):
        return f"apical {command} needs a subcommand: {match[1].replace(', ', ' or ')}{see}"
    if match := re.search(r"invalid choice '(.*?)' for argument '(\S+)'\. Expected one of \((.*?)\)", text):
        choices = [choice for choice in re.findall(r"'(.*?)'", match[3]) if choice != "None"]
        return f"{match[2]} must be one of {', '.join(sorted(choices))}; got {match[1]!r}{_near(match[1], choices)}"
    if match := re.search(r"Error parsing (\S+): (.*)", text):
        values = re.findall(r"\['(.*?)'\]", match[2]) or re.findall(r": '(.*?)'", match[2])
        what = "a whole number" if "INT" in match[2] or "int()" in match[2] else "numbers" if "FLOAT" in match[2] else ""
        got = f"; got {values[0]!r}" if values else ""
        return f"{written.get(match[1], match[1])} needs {what or 'another kind of value'}{got}{see}"
    return f"{text.rstrip('.')}{see}"


def _plain(box: str) -> str:
    """Return the text before the first line across the box."""
    lines = []
    for line in box.splitlines():
        inner = re.sub("^[│┃] ?| ?[│┃]$", "", re.sub("\x1b\\[[0-9;]*m", "", line).rstrip()).strip()
        if inner.startswith(("╭", "╰")):
            continue
        if inner.startswith("──"):
            break
        lines.append(inner)
    return " ".join(" ".join(lines).split())


def _near(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""
