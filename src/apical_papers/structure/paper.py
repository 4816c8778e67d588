"""Tables of structure and depth."""

from apical.bench.papers import Paper, own_study, seed_study

PAPER = Paper(
    title="Addressing caveats of neural persistence with deep graph persistence",
    reference="Girrbach et al., TMLR 2023, arXiv 2307.10865; Yuan et al., ECCV 2020, arXiv 2008.08261; Choromanski et al., "
    "NeurIPS 2020, arXiv 2006.11421; Yuan et al., arXiv 2105.13905; Weng et al., arXiv 2212.01744; "
    "Trautner et al., arXiv 2106.11409",
    studies={},
    tables={
        "study": seed_study(
            "How far credit arrives in deep chains, and what rules leave in the weights",
            "apical_papers.structure.study",
            epochs=(1, 5, 5),
            seeds=(2, 10, 10),
            hours={"cpu": 0.44},
        ),
        "depth": own_study(
            "Credit in deep chains: every other rule, also those that refuse some of the chains",
            "apical_papers.structure.depth_study",
            {"deepest": 10, "seeds": 2},
            {"deepest": 200, "seeds": 10},
            {"deepest": 200, "seeds": 10},
            hours={"cpu": 1.36},
        ),
        "theory": seed_study(
            "Product nodes for a Lorenz system, gradients along flows, and channels",
            "apical_papers.structure.theory",
            epochs=(1, 5, 5),
            seeds=(2, 10, 10),
        ),
    },
)
