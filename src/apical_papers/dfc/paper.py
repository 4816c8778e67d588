"""Deep feedback control: what there is to run again."""

from functools import partial

from apical.bench.papers import Paper, Table, cut, table_of
from apical_papers.dfc.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    studies=STUDIES,
    tables={
        "toy": Table(
            "Deep feedback control on student-teacher regression",
            {
                "smoke": {"epochs": 2, "seeds": 1, "samples": 512},
                "cpu": {"epochs": 150, "seeds": 3, "samples": 5000},
                "paper": {"epochs": 150, "seeds": 5, "samples": 5000},
            },
            module="apical_papers.dfc.toy.study",
            needs={"epochs": 150, "seeds": 3, "samples": 5000},
        ),
        "mnist": of("dfc-mnist", cut(256), {"epochs": 10, "seeds": 3}, {"epochs": 100, "seeds": 5}),
    },
)
