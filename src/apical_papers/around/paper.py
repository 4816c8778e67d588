"""Tables of node importance (GRAPES), local solvers and semi-implicit steps."""

from apical.bench.papers import Paper, cut, seed_study, table_of
from apical_papers.around.recipes import STUDIES

PAPER = Paper(
    title="Introducing principles of synaptic integration in the optimization of deep neural networks",
    reference="Dellaferrera et al., Nature Communications 13, 2022, arXiv 2104.11604; "
    "Paeedeh and Ghiasi-Shirazi, arXiv 2003.05164; Liu and Zhang, arXiv 2002.03516",
    studies=STUDIES,
    tables={
        "study": seed_study(
            "How an error is used: node importance, local solvers, semi-implicit steps",
            "apical_papers.around.study",
            epochs=(1, 6, 6),
            seeds=(2, 10, 10),
            hours={"cpu": 0.5},
        ),
        "damping": seed_study(
            "The local solver's damping and its range of learning rates",
            "apical_papers.around.damping",
            epochs=(1, 5, 5),
            seeds=(2, 5, 5),
        ),
        "window": seed_study(
            "The local solver's usable range of learning rates, chosen and tested",
            "apical_papers.around.window",
            epochs=(1, 5, 5),
            seeds=(2, 5, 5),
        ),
        "mnist": table_of(STUDIES, "grapes-mnist", cut(1024), {"epochs": 5, "seeds": 3}, {"epochs": 20, "seeds": 5}),
    },
)
