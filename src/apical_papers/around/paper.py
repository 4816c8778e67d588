"""Node importance (GRAPES), with local solvers and semi-implicit steps beside it: what there is to run again."""

from apical.bench.papers import Paper, Table, cut, table_of
from apical_papers.around.recipes import STUDIES

PAPER = Paper(
    title="Introducing principles of synaptic integration in the optimization of deep neural networks",
    reference="Dellaferrera et al., Nature Communications 13, 2022, arXiv 2104.11604; "
    "Paeedeh and Ghiasi-Shirazi, arXiv 2003.05164; Liu and Zhang, arXiv 2002.03516",
    studies=STUDIES,
    tables={
        "study": Table(
            "How an error is used: node importance, local solvers, semi-implicit steps",
            {"smoke": {"epochs": 1, "seeds": 2}, "cpu": {"epochs": 6, "seeds": 5}, "paper": {"epochs": 6, "seeds": 10}},
            module="apical_papers.around.study",
            side_by_side=True,
            needs={"epochs": 6, "seeds": 5},
            hours={"cpu": 0.25},
        ),
        "damping": Table(
            "The local solver's damping and its range of learning rates",
            {"smoke": {"epochs": 1, "seeds": 2}, "cpu": {"epochs": 5, "seeds": 5}, "paper": {"epochs": 5, "seeds": 5}},
            module="apical_papers.around.damping",
            side_by_side=True,
            needs={"epochs": 5, "seeds": 5},
        ),
        "mnist": table_of(STUDIES, "grapes-mnist", cut(1024), {"epochs": 5, "seeds": 5}, {"epochs": 20, "seeds": 5}),
    },
)
