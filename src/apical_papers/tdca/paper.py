"""Top-down credit assignment: what there is to run again."""

from apical.bench.papers import Paper, Table
from apical_papers.tdca.recipes import EVOLUTIONS

PAPER = Paper(
    title="Biologically plausible training of deep neural networks using a top-down credit assignment network",
    reference="Chen, Liu and Wang, 2022, arXiv 2208.01416",
    evolutions=EVOLUTIONS,
    tables={
        "classification": Table(
            "Top-down credit assignment on classification, with controls",
            {
                "smoke": {"generations": 1, "seeds": 2, "arms": "sites-4"},
                "cpu": {"generations": 150, "seeds": 5},
                "paper": {"generations": 150, "seeds": 5},
            },
            module="apical_papers.tdca.classification.study",
            needs={"generations": 150, "seeds": 5},
            hours={"cpu": 0.53},
        ),
        "diffusion": Table(
            "Credit diffusion, before and after",
            {
                "smoke": {"generations": 1, "seeds": 2},
                "cpu": {"generations": 40, "seeds": 5},
                "paper": {"generations": 40, "seeds": 5},
            },
            module="apical_papers.tdca.diffusion.study",
            needs={"generations": 40, "seeds": 5},
            hours={"cpu": 0.48},
        ),
        "diffusion-logits": Table(
            "Credit diffusion, before and after, with credit on logits",
            {
                "smoke": {"credit": "logits", "generations": 1, "seeds": 2},
                "cpu": {"credit": "logits", "generations": 40, "seeds": 5},
                "paper": {"credit": "logits", "generations": 40, "seeds": 5},
            },
            module="apical_papers.tdca.diffusion.study",
            needs={"generations": 40, "seeds": 5},
        ),
        "functions": Table(
            "Top-down credit assignment on non-convex functions",
            {
                "smoke": {"generations": 2, "generations_large": 2, "generations_further": 2, "seeds": 2, "starts": 16},
                "cpu": {"generations": 500, "generations_large": 200, "generations_further": 100, "seeds": 5},
                "paper": {"generations": 500, "generations_large": 200, "generations_further": 100, "seeds": 5},
            },
            module="apical_papers.tdca.functions.study",
            needs={"generations": 500, "generations_large": 200, "generations_further": 100, "seeds": 5},
            hours={"cpu": 0.46},
        ),
        "basins": Table(
            "Basins that evolved top-down networks leave on non-convex functions",
            {
                "smoke": {"generations": 1, "seeds": 2},
                "cpu": {"generations": 200, "seeds": 5},
                "paper": {"generations": 200, "seeds": 5},
            },
            module="apical_papers.tdca.functions.basins",
            needs={"generations": 200, "seeds": 5},
        ),
        "acrobot": Table(
            "Top-down credit assignment on Acrobot",
            {
                "smoke": {"cases": "acrobot", "generations": 1, "generations_state": 1, "seeds": 2, "lifetimes": 2},
                "cpu": {"cases": "acrobot", "generations": 24, "generations_state": 10, "seeds": 5, "lifetimes": 8},
                "paper": {"cases": "acrobot", "generations": 60, "generations_state": 20, "seeds": 5, "lifetimes": 16},
            },
            module="apical_papers.tdca.reinforcement.study",
            needs={"generations": 24, "generations_state": 10, "seeds": 5},
        ),
        "reinforcement": Table(
            "Top-down credit assignment on CartPole and Pendulum",
            {
                "smoke": {
                    "generations": 1,
                    "generations_state": 1,
                    "generations_ungated": 1,
                    "seeds": 2,
                    "lifetimes": 4,
                },
                "cpu": {"generations": 60, "generations_state": 20, "generations_ungated": 15, "seeds": 5},
                "paper": {"generations": 60, "generations_state": 20, "generations_ungated": 15, "seeds": 5},
            },
            module="apical_papers.tdca.reinforcement.study",
            needs={"generations": 60, "generations_state": 20, "generations_ungated": 15, "seeds": 5},
            hours={"cpu": 0.3},
        ),
    },
)
"""The paper's own sizes are not known; "paper" is what "cpu" is."""
