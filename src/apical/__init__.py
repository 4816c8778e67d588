"""Train `nn.Module`s with credit-assignment rules other than backpropagation."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from apical.comparison import compare as compare
    from apical.exports import *  # noqa: F403
    from apical.sklearn_estimator import CreditClassifier as CreditClassifier
else:
    _HEAVY = {"CreditClassifier": "apical.sklearn_estimator", "compare": "apical.comparison"}

    def __getattr__(name: str) -> Any:
        """Import a public name or a submodule at its first use: importing torch is slow, and Ctrl-C must work before."""
        if name in _HEAVY:
            return getattr(import_module(_HEAVY[name]), name)
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module 'apical' has no attribute {name!r}")
        if find_spec(f"apical.{name}"):
            return import_module(f"apical.{name}")
        exports = {k: v for k, v in vars(import_module("apical.exports")).items() if not k.startswith("_")}
        if name == "__all__":
            return sorted([*exports, *_HEAVY])
        if name not in exports:
            raise AttributeError(f"module 'apical' has no attribute {name!r}")
        return exports[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
