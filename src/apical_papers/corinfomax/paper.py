"""Tables of CorInfoMax."""

from functools import partial

from apical.bench.papers import Paper, cut, seed_study, table_of
from apical_papers.corinfomax.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    title=(
        "Correlative information maximization: a biologically plausible "
        "approach to supervised deep neural networks without weight symmetry"
    ),
    reference="Bozkurt, Pehlevan and Erdogan, NeurIPS 36, 2023, arXiv 2306.04810",
    studies=STUDIES,
    tables={
        "digits": of(
            "corinfomax-digits", {"epochs": 1, "seeds": 2}, {"epochs": 20, "seeds": 10}, {"epochs": 20, "seeds": 10}
        ),
        "study": seed_study(
            "CorInfoMax: step sizes, forward learning, alignment, sparseness",
            "apical_papers.corinfomax.study",
            epochs=(1, 20, 20),
            seeds=(2, 10, 10),
            hours={"cpu": 0.12},
        ),
        "mnist": of("corinfomax-mnist", cut(640), {"epochs": 10, "seeds": 3}, {"epochs": 50, "seeds": 10}),
        "fashion": of("corinfomax-fashion", cut(640), {"epochs": 10, "seeds": 1}, {"epochs": 50, "seeds": 10}),
        "cifar10": of("corinfomax-cifar10", cut(256), {"epochs": 1, "seeds": 1}, {"epochs": 50, "seeds": 10}),
    },
)
