"""Tables of predictive coding."""

from functools import partial

from apical.bench.papers import Paper, cut, seed_study, table_of
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
        "study": seed_study(
            "Predictive coding: inference, depth and what is backpropagation",
            "apical_papers.predictive_coding.study",
            epochs=(1, 4, 4),
            seeds=(2, 3, 5),
        ),
        **{
            name.removeprefix("pc-"): of(name, cut(640), {"epochs": n, "seeds": 5}, {"epochs": n, "seeds": 5})
            for name, n in (("pc-states", 1), ("pc-deep", 1), ("pc-mu", 1), ("pc-tanh", 30))
        },
    },
)
