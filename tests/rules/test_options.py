"""Numbers that no option takes (not a number, infinity, a fraction of a step) are refused by every rule, which names it."""

import inspect
import math
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from torch import nn

import apical
from apical import CreditRule
from apical.errors import ConfigError


def cases() -> Iterator[Any]:
    rules = [rule for rule in (getattr(apical, name) for name in dir(apical)) if inspect.isclass(rule)]
    for rule in rules:
        if not issubclass(rule, CreditRule) or rule in (CreditRule, apical.Modulated, apical.LocalSolve):
            continue
        for option, hint in get_type_hints(rule.__init__).items():
            kinds = [hint, *(get_args(hint) if get_origin(hint) in (Union, UnionType) else ())]
            numbers = [math.nan, math.inf, 1.5] if int in kinds else [math.nan, math.inf] if float in kinds else []
            for number in numbers:
                yield pytest.param(rule, option, number, id=f"{rule.__name__}-{option}-{number}")


def network(activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))


@pytest.mark.parametrize(("rule", "option", "number"), list(cases()))
def test_a_number_out_of_range_is_refused(rule: type[CreditRule], option: str, number: float) -> None:
    fits = nn.ReLU if rule in (apical.CorInfoMax, apical.ContrastiveSignalPlasticity) else nn.Tanh
    rule(network(fits))  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=option.removesuffix("_fb")):
        rule(network(fits), **{option: number})  # type: ignore[call-arg]
