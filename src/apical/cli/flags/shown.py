"""How options are shown, and options that follow from the fields of a recipe."""

from collections.abc import Iterable
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import arg

from apical.cli.flags.help import field_texts


def shown(name: str, hint: str = "") -> Any:
    """Annotate how an option is shown; None as a default means that the recipe decides."""
    return arg(metavar=name, help_behavior_hint=hint)


def settings_of(recipe: type[Any], without: Iterable[str]) -> type[Any]:
    """Make a dataclass with an option for each other field of a recipe; None leaves it to --recipe or the default."""
    hints, texts, options = get_type_hints(recipe, include_extras=True), field_texts(recipe), []
    for item in fields(recipe):
        if item.name not in without:
            kind, *more = get_args(hint) if get_origin(hint := hints[item.name]) is Annotated else (hint,)
            metavar, default = more[0] if more else (_metavar(kind), "")
            default = default or _written(item.default)
            option = arg(
                metavar=metavar, help=texts[item.name], help_behavior_hint=f"(default: {default})" if default else ""
            )
            options.append((item.name, Annotated[kind | None, option], field(default=None)))
    return make_dataclass("Settings", options, frozen=True, kw_only=True, namespace={"__module__": __name__})


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])} ..."
    return {bool: "True|False", int: "N", int | None: "N", float: "X"}[kind]


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_written, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
