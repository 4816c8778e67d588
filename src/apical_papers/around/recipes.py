"""Rules around rules: a recipe for `apical compare`.

`grapes-mnist` has the settings of the README of IBM/GRAPES (arXiv 2104.11604) with 784-256-256-10: SGD at 0.1, batch 64;
without dropout, where the code keeps 90 % of the units, and for 20 epochs, not 200. No readable source with the paper's
tables was found, so no row has a published number. Always run the control `matched:bp` together with `grapes:bp`.
Consequentialism updates and semi-implicit backpropagation are in the study, whose marks were written before it was run; its
learning rates of CCL were chosen after inspecting one seed.
"""

from apical.bench.recipe import Recipe
from apical.bench.study import Study, rows_of

BASE = Recipe(
    data="mnist",
    model="mlp-256-256",
    epochs=20,
    batch_size=64,
    optimizer="sgd",
    lr=(0.1,),
    momentum=0.0,
    weight_decay=(0.0,),
)
SLOW = (0.02,)
"""Rate of FA and DFA, the best for the bare rules from 0.1 to 0.005 by validation over five epochs; at 0.1 DFA diverges."""
RULES = ("bp", "grapes:bp", "matched:bp", "fa", "grapes:fa", "matched:fa", "dfa", "grapes:dfa", "matched:dfa")

STUDIES = {
    "grapes-mnist": Study(
        "Node importance and its control on MNIST, 784-256-256-10",
        "minutes",
        rows_of(BASE, {rule: {"lr": BASE.lr if rule.endswith("bp") else SLOW} for rule in RULES}),
        BASE,
    )
}
