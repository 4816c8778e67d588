"""Tables of target propagation."""

from functools import partial

from apical.bench.papers import Paper, cut, seed_study, table_of
from apical_papers.tp.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    title="A theoretical framework for target propagation",
    reference="Meulemans, Carzaniga, Suykens, Sacramento and Grewe, NeurIPS 33, 2020, arXiv 2006.14331",
    studies=STUDIES,
    tables={
        "digits": of(
            "tp-digits",
            {"epochs": 1, "seeds": 2},
            {"epochs": 20, "seeds": 10},
            {"epochs": 20, "seeds": 10},
        ),
        "targets": seed_study(
            "Target propagation: where targets point",
            "apical_papers.tp.targets",
            epochs=(1, 20, 20),
            seeds=(2, 10, 10),
            hours={"cpu": 0.25},
        ),
        "mnist": of("tp-mnist", cut(1024), {"epochs": 10, "seeds": 3}, {"epochs": 100, "seeds": 10}),
        "fashion": of("tp-fashion", cut(1024), {"epochs": 10, "seeds": 1}, {"epochs": 100, "seeds": 10}),
        "cifar10": of("tp-cifar10", cut(256), {"epochs": 2, "seeds": 1}, {"epochs": 100, "seeds": 10}),
    },
)
