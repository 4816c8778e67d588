"""Every rule trains each odd module as it says, or refuses it by name; what an edge or a cut reaches is trained."""

import pytest
from tests.rules.test_conformance import RULES

from apical.testing.odd_check import check_odd_network, quotes
from apical.testing.odd_modules import ODD

REFUSED = {"fa": {"functional call", "orphan"}, "dfa": {"orphan"}}
"""What the mathematics does not reach: a weight that no layer applies."""


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("rule", REFUSED)
def test_edges_and_cuts_train_all_but_weights_without_a_layer(rule: str, kind: str) -> None:
    assert check_odd_network(RULES[rule], [kind]) == (kind not in REFUSED[rule])


@pytest.mark.parametrize("rule", ["kp", "kp-explicit", "pfa", "pfa-literal", "usf", "wm", "tdca", "ccl", "dfc", "dtp", "ep"])
def test_functions_of_the_weight_and_shared_layers(rule: str) -> None:
    for kind in ("masked", "scaled", "low rank", "weight norm", "pruned", "two names", "tied", "checkpoint", "recurrent"):
        check_odd_network(RULES[rule], [kind])


def test_names_in_errors() -> None:
    assert quotes("layer 'body.0' is odd", ["body", "body.0"])
    assert quotes("parameter 'body.0.weight' is odd", ["body.0"])
    assert not quotes("layer 'bodyguard' is odd", ["body"])
    assert not quotes("a layer is odd: 'x'", ["", "body"])
