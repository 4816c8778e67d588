"""How options are shown."""

from typing import Any

from tyro.conf import arg


def shown(name: str, hint: str = "") -> Any:
    """How an option is shown; None as a default means that the recipe decides."""
    return arg(metavar=name, help_behavior_hint=hint)
