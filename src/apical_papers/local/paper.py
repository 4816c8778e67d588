"""Tables of local classifiers."""

from functools import partial

from apical.bench.papers import Paper, cut, seed_study, table_of
from apical_papers.local.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    title="Training neural networks with local error signals",
    reference=(
        "Nøkland and Eidnes, ICML 2019, arXiv 1901.06656; Mono-Forward: Gong, Li and Abdulla, 2025, arXiv 2501.09238"
    ),
    studies=STUDIES,
    tables={
        "mnist": of("local-mnist", cut(1280), {"epochs": 3, "seeds": 1, "train_limit": 10000}, {"epochs": 100, "seeds": 3}),
        "study": seed_study(
            "Local classifiers on 5000 digits of MNIST: which local loss",
            "apical_papers.local.study",
            epochs=(1, 4, 4),
            seeds=(2, 10, 10),
            least=5,
            hours={"cpu": 0.16},
        ),
    },
)
