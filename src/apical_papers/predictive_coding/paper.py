"""Predictive coding: what there is to run again."""

from functools import partial

from apical.bench.papers import Paper, Table, cut, table_of
from apical_papers.predictive_coding.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    title="Benchmarking predictive coding networks -- made simple",
    reference=(
        "Pinchetti and others, ICLR 2025, arXiv 2407.01163; Goemaere and others, arXiv 2505.20137; "
        "Innocenti and others, NeurIPS 38, 2025, arXiv 2505.13124; Salvatori and others, arXiv 2212.00720"
    ),
    studies=STUDIES,
    tables={
        "study": Table(
            "Predictive coding: inference, depth and what is backpropagation",
            {"smoke": {"epochs": 1, "seeds": 2}, "cpu": {"epochs": 4, "seeds": 3}, "paper": {"epochs": 4, "seeds": 5}},
            module="apical_papers.predictive_coding.study",
            side_by_side=True,
            needs={"epochs": 4, "seeds": 3},
        ),
        **{
            name.removeprefix("pc-"): of(name, cut(640), {"epochs": n, "seeds": 3}, {"epochs": n, "seeds": 5})
            for name, n in (("pc-states", 1), ("pc-deep", 1), ("pc-mu", 1), ("pc-tanh", 30))
        },
    },
)
