"""Tables of equilibrium propagation."""

from functools import partial

from apical.bench.papers import Paper, cut, own_study, seed_study, table_of
from apical_papers.equilibrium.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    title="Equilibrium propagation: bridging the gap between energy-based models and backpropagation",
    reference=(
        "Scellier and Bengio, Frontiers in Computational Neuroscience 11, 2017, doi 10.3389/fncom.2017.00024; nudges on "
        "both sides: Laborieux, Ernoult, Scellier, Bengio, Grollier and Querlioz, Frontiers in Neuroscience 15, 2021, arXiv "
        "2006.03824; nudges on a circle: Laborieux and Zenke, NeurIPS 35, 2022, arXiv 2209.00530; directed weights: "
        "Laborieux and Zenke, ICLR 2024, arXiv 2309.02214"
    ),
    studies=STUDIES,
    tables={
        "digits": of("ep-digits", {"epochs": 1, "seeds": 2}, {"epochs": 20, "seeds": 10}, {"epochs": 20, "seeds": 10}),
        "mnist": of("ep-mnist", cut(640), {"epochs": 25, "seeds": 5}, {"epochs": 25, "seeds": 5}),
        "study": seed_study(
            "Equilibrium propagation: gradients, and weights that learn apart",
            "apical_papers.equilibrium.study",
            epochs=(1, 20, 20),
            seeds=(2, 10, 10),
            hours={"cpu": 0.14},
        ),
        "logic": seed_study(
            "Complete directed networks on exclusive or",
            "apical_papers.equilibrium.logic",
            epochs=(2, 200, 200),
            seeds=(2, 10, 10),
            least=3,
            hours={"cpu": 0.34},
        ),
        "noise": own_study(
            "Equilibrium propagation with noisy neurons, digits",
            "apical_papers.equilibrium.noise",
            {"epochs": 1, "seeds": 2, "train_limit": 200},
            {"epochs": 15, "seeds": 10},
            {"epochs": 15, "seeds": 10},
            hours={"cpu": 0.38},
        ),
    },
)
