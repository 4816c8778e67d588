"""Dual propagation: what there is to run again."""

from apical.bench.papers import Paper, Table, cut, table_of
from apical_papers.dual_propagation.recipes import STUDIES

PAPER = Paper(
    title="Dual propagation: accelerating contrastive Hebbian learning with dyadic neurons",
    reference="Høier, Staudt and Zach, ICML 2023, arXiv 2302.01228; Høier and Zach, ICML 2024, arXiv 2402.08573",
    studies=STUDIES,
    tables={
        "study": Table(
            "Dual propagation: nudges, orders and the Lipschitz bound",
            {"smoke": {"epochs": 1, "seeds": 2}, "cpu": {"epochs": 4, "seeds": 5}, "paper": {"epochs": 4, "seeds": 10}},
            module="apical_papers.dual_propagation.study",
            side_by_side=True,
            needs={"epochs": 4, "seeds": 3},
        ),
        "mnist": table_of(STUDIES, "dualprop-mnist", cut(400), {"epochs": 2, "seeds": 1}, {"epochs": 100, "seeds": 5}),
    },
)
