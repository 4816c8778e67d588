"""Check that a rule trains odd modules as it says, or refuses them by name."""

import re
from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F

from apical.errors import ConfigError, UnsupportedModelError
from apical.testing.comparison import Factory
from apical.testing.model import check_model
from apical.testing.networks import dense_batch
from apical.testing.odd_modules import ACTIVATIONS, ODD, odd_network

EXAMPLES = 4
"""Networks that :func:`check_odd_modules` draws."""


def check_odd_modules(factory: Factory, examples: int = EXAMPLES) -> None:
    """Networks of odd modules are trained as the rule says, or refused by an error that quotes a module's name.

    The networks are drawn by hypothesis, where it is installed: the same ones every time, others for every rule.

    Args:
        factory: makes the rule.
        examples: how many networks are drawn.

    Raises:
        AssertionError: one is neither trained as the rule says nor refused by name.
    """
    try:
        import hypothesis
        import hypothesis.strategies as st
    except ImportError:
        for i in range(examples):
            check_odd_network(factory, list(ODD)[(7 * i + _number(factory)) % len(ODD) :][:1])
        return

    @hypothesis.seed(_number(factory))
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.lists(st.sampled_from(sorted(ODD)), min_size=1, max_size=2),
        st.sampled_from(sorted(ACTIVATIONS)),
        st.integers(4, 7),
    )
    def drawn(kinds: list[str], activation: str, size: int) -> None:
        check_odd_network(factory, kinds, activation, size)

    drawn()


def check_odd_network(factory: Factory, kinds: Sequence[str], activation: str = "tanh", size: int = 8) -> bool:
    """One network of odd modules from :data:`apical.testing.odd_modules.ODD`; returns whether the rule trains it.

    Networks that PyTorch itself cannot differentiate (a tanh whose output is changed in place) count for nothing.

    Raises:
        AssertionError: it is neither trained as the rule says nor refused by name.
    """
    inputs, targets = dense_batch(0, size)
    try:
        F.cross_entropy(odd_network(kinds, activation)(inputs), targets).backward()
    except RuntimeError:
        return False
    torch.manual_seed(0)
    model = odd_network(kinds, activation)
    try:
        check_model(factory(model, F.cross_entropy), inputs, targets, skip=("compiled",))
    except (UnsupportedModelError, ConfigError) as error:
        if not quotes(str(error), (name for name, _ in model.named_modules())):
            raise AssertionError(f"{kinds} are refused by an error that names none of their modules: {error}") from error
        return False
    except Exception as error:
        raise AssertionError(f"{kinds} with {activation}: {error}") from error
    return True


def quotes(text: str, names: Iterable[str]) -> bool:
    """Return whether a text has one of the modules, or a parameter of one, in quotation marks.

    >>> quotes("layer 'a.b' is odd", ["a.b"]), quotes("parameter 'a.w' is odd", ["a"]), quotes("layer ab is odd", ["ab"])
    (True, True, False)
    """
    quoted = re.findall(r"'([^']+)'", text)
    return any(q == name or q.startswith(f"{name}.") for name in names if name for q in quoted)


def _number(factory: Any) -> int:
    """Return a number that is the same for the same rule and options in every process."""
    kind = getattr(factory, "func", factory)
    options = sorted((getattr(factory, "keywords", None) or {}).items())
    return crc32(f"{getattr(kind, '__qualname__', '')}{options}".encode())
