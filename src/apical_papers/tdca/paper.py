"""Tables of top-down credit assignment."""

from typing import Any

from apical.bench.papers import Paper, Sizes, Table, own_study
from apical_papers.tdca.recipes import EVOLUTIONS


def _table(title: str, module: str, smoke: Sizes, cpu: Sizes, paper: Sizes | None = None, **more: Any) -> Table:
    """The paper's sizes are not known; "paper" equals "cpu"."""
    return own_study(title, f"apical_papers.tdca.{module}", smoke, cpu, paper or cpu, **more)


_LOGITS: Sizes = {"credit": "logits"}
_DIFFUSION: Sizes = {"generations": 40, "seeds": 5}
_FUNCTIONS: Sizes = {"generations": 500, "generations_large": 200, "generations_further": 100, "seeds": 5}
_POLICIES: Sizes = {"generations": 60, "generations_state": 20, "generations_ungated": 15, "seeds": 5}

PAPER = Paper(
    title="Biologically plausible training of deep neural networks using a top-down credit assignment network",
    reference="Chen, Liu and Wang, 2022, arXiv 2208.01416",
    evolutions=EVOLUTIONS,
    tables={
        "classification": _table(
            "Top-down credit assignment on classification, with controls",
            "classification.study",
            {"generations": 1, "seeds": 2, "arms": "sites-4"},
            {"generations": 150, "seeds": 5},
            hours={"cpu": 0.17},
        ),
        "settled": _table(
            "Top-down credit assignment on classification, fitness over the last ten steps",
            "classification.study",
            {"generations": 1, "seeds": 2, "arms": "sites-4", "settled": 2, "tasks": 2, "validation": 1},
            {"arms": "unit sites-4", "settled": 10, "first": 6000, "tasks": 64, "validation": 64, "seeds": 8},
            hours={"cpu": 0.36},
        ),
        "diffusion": _table(
            "Credit diffusion, before and after",
            "diffusion.study",
            {"generations": 1, "seeds": 2},
            _DIFFUSION,
            hours={"cpu": 0.09},
        ),
        "diffusion-logits": _table(
            "Credit diffusion, before and after, with credit on logits",
            "diffusion.study",
            {**_LOGITS, "generations": 1, "seeds": 2},
            _LOGITS | _DIFFUSION,
            hours={"cpu": 0.08},
        ),
        "functions": _table(
            "Top-down credit assignment on non-convex functions",
            "functions.study",
            {"generations": 2, "generations_large": 2, "generations_further": 2, "seeds": 2, "starts": 16},
            _FUNCTIONS,
            hours={"cpu": 0.05},
        ),
        "functions-10d": _table(
            "Top-down credit assignment on non-convex functions in ten dimensions, longer evolutions",
            "functions.study",
            {"groups": "large", "generations_large": 2, "seeds": 2, "starts": 16},
            {"groups": "large", "generations_large": 600, "first": 40, "seeds": 10},
            hours={"cpu": 0.12},
        ),
        "basins": _table(
            "Basins that evolved top-down networks leave on non-convex functions",
            "functions.basins",
            {"generations": 1, "seeds": 2},
            {"generations": 200, "seeds": 5},
            hours={"cpu": 0.01},
        ),
        "acrobot": _table(
            "Top-down credit assignment on Acrobot",
            "reinforcement.study",
            {"cases": "acrobot", "generations": 1, "generations_state": 1, "seeds": 2, "lifetimes": 2},
            {"cases": "acrobot", "generations": 60, "generations_state": 20, "seeds": 5, "lifetimes": 16},
            needs={"generations": 24, "generations_state": 10, "seeds": 5},
            hours={"cpu": 0.98},
        ),
        "reinforcement": _table(
            "Top-down credit assignment on CartPole and Pendulum",
            "reinforcement.study",
            {"generations": 1, "generations_state": 1, "generations_ungated": 1, "seeds": 2, "lifetimes": 4},
            _POLICIES,
            hours={"cpu": 0.06},
        ),
        "classes": _table(
            "One top-down network for any number of classes",
            "classes",
            {"generations": 1, "seeds": 2, "tasks": 2, "validation": 1},
            {"generations": 40, "seeds": 5},
            hours={"cpu": 0.2},
        ),
        "several": _table(
            "One top-down network for CartPole, Pendulum and Acrobot",
            "reinforcement.several",
            {"generations": 1, "seeds": 2, "lifetimes": 2},
            {"generations": 40, "seeds": 5},
            hours={"cpu": 0.54},
        ),
    },
)
