"""Tables of spiking networks."""

from functools import partial

from apical.bench.papers import Paper, cut, own_study, seed_study, table_of
from apical_papers.spikes.recipes import STUDIES

of = partial(table_of, STUDIES)

PAPER = Paper(
    title="Contrastive signal-dependent plasticity: Self-supervised learning in spiking neural circuits",
    reference=(
        "Ororbia, Science Advances 10, eadn6076, 2024, arXiv 2303.18187; on memristors: Merkel and Ororbia, 2024, "
        "arXiv 2409.10887; first spikes: Zhang et al., 2021, arXiv 2003.11837"
    ),
    studies=STUDIES,
    tables={
        "csdp": of("csdp-mnist", cut(1000), {"epochs": 3, "seeds": 1, "train_limit": 20000}, {"epochs": 10, "seeds": 3}),
        "first-spike": of(
            "first-spike-mnist", cut(320), {"epochs": 3, "seeds": 1, "train_limit": 20000}, {"epochs": 10, "seeds": 3}
        ),
        "mnist": own_study(
            "Spiking networks on MNIST beside controls",
            "apical_papers.spikes.mnist",
            {"epochs": 1, "seeds": 2, "images": 200},
            {"epochs": 4, "seeds": 3},
            {"epochs": 4, "seeds": 10},
            needs={"epochs": 4, "seeds": 3, "images": 30000},
        ),
        "study": seed_study(
            "Spiking networks on a little of MNIST", "apical_papers.spikes.study", epochs=(1, 4, 4), seeds=(2, 10, 10)
        ),
        "logic": seed_study(
            "Logic with two inputs by memristors", "apical_papers.spikes.logic", epochs=(3, 300, 300), seeds=(2, 20, 20)
        ),
    },
)
