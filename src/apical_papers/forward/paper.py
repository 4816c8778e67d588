"""Tables of forward-forward."""

from functools import partial

from apical.bench.papers import Paper, cut, seed_study, table_of
from apical_papers.forward.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    title="The forward-forward algorithm: some preliminary investigations",
    reference=(
        "Hinton, 2022, arXiv 2212.13345; differences: Lee and Song, 2023, arXiv 2303.08418; self-contrastive: Chen, Liu, "
        "Laydevant and Grollier, Nature Communications 16, 2025, arXiv 2409.11593"
    ),
    studies=STUDIES,
    tables={
        "mnist": of("ff-mnist", cut(1000), {"epochs": 3, "seeds": 1, "train_limit": 10000}, {"epochs": 100, "seeds": 3}),
        "study": seed_study(
            "Forward-forward on 5000 digits of MNIST, and the read-out alone",
            "apical_papers.forward.study",
            epochs=(2, 30, 30),
            seeds=(2, 10, 10),
            hours={"cpu": 0.59},
        ),
    },
)
