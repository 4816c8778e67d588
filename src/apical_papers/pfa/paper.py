"""Tables of product feedback alignment."""

from functools import partial

from apical.bench.papers import Paper, Table, cut, table_of
from apical_papers.pfa.claims import CLAIMS
from apical_papers.pfa.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    title="Deep learning without weight symmetry",
    reference="Ji-An and Benna, 2024, arXiv 2405.20594",
    studies=STUDIES,
    claims=(CLAIMS,),
    tables={
        "theory": Table(
            "Product feedback alignment: the angle follows the expansion ratio",
            {"smoke": {"draws": 3}, "cpu": {"draws": 100}, "paper": {"draws": 100}},
            module="apical_papers.pfa.theory",
            needs={"draws": 100},
            result="file",
            hours={"cpu": 0.004},
        ),
        "mnist": of("pfa-mnist", cut(640), {"epochs": 5, "seeds": 3}, {"epochs": 40, "seeds": 5}, {"cpu": 0.26}),
        "cifar10-small": of(
            "pfa-cifar10-small", cut(128), {"epochs": 8, "seeds": 5}, {"epochs": 8, "seeds": 5}, {"cpu": 1.49}
        ),
        "cifar10": of("pfa-cifar10", cut(256), {"epochs": 30, "seeds": 1}, {"epochs": 250, "seeds": 5}),
    },
)
