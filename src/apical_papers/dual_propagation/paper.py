"""Tables of dual propagation."""

from apical.bench.papers import Paper, cut, seed_study, table_of
from apical_papers.dual_propagation.recipes import STUDIES

PAPER = Paper(
    title="Dual propagation: accelerating contrastive Hebbian learning with dyadic neurons",
    reference="Høier, Staudt and Zach, ICML 2023, arXiv 2302.01228; Høier and Zach, ICML 2024, arXiv 2402.08573",
    studies=STUDIES,
    tables={
        "study": seed_study(
            "Dual propagation: nudges, orders and the Lipschitz bound",
            "apical_papers.dual_propagation.study",
            epochs=(1, 4, 4),
            seeds=(2, 10, 10),
            least=3,
        ),
        "mnist": table_of(STUDIES, "dualprop-mnist", cut(400), {"epochs": 100, "seeds": 1}, {"epochs": 100, "seeds": 5}),
    },
)
