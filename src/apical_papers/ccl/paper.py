"""Tables of counter-current learning."""

from functools import partial

from apical.bench.papers import Paper, cut, table_of
from apical_papers.ccl.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    title="Counter-current learning: a biologically plausible dual network approach for deep learning",
    reference="Kao and Hariharan, NeurIPS 37, 2024, arXiv 2409.19841",
    studies=STUDIES,
    tables={
        "mnist": of("ccl-mnist", cut(1024), {"epochs": 100, "seeds": 5}, {"epochs": 100, "seeds": 5}, {"cpu": 1.42}),
        "fashion": of("ccl-fashion", cut(1024), {"epochs": 100, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "cifar10": of("ccl-cifar10", cut(1024), {"epochs": 20, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "cifar100": of("ccl-cifar100", cut(1024), {"epochs": 20, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "mnist-others": of(
            "ccl-mnist-others", cut(1024), {"epochs": 100, "seeds": 5}, {"epochs": 100, "seeds": 5}, {"cpu": 2.24}
        ),
        "fashion-others": of("ccl-fashion-others", cut(1024), {"epochs": 100, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "cifar10-cnn": of("ccl-cifar10-cnn", cut(256), {"epochs": 1, "seeds": 1}, {"epochs": 100, "seeds": 5}),
    },
)
