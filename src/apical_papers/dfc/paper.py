"""Tables of deep feedback control."""

from functools import partial

from apical.bench.papers import Paper, Sizes, cut, own_study, table_of
from apical_papers.dfc.recipes import STUDIES

of = partial(table_of, STUDIES)

FEW: Sizes = {"train_limit": 5000}
LEARN: Sizes = {"pretrain_epochs": 27, "feedback_fraction": 1.0}
"""As many updates of the feedback before the first epoch as in the full-size table, about 1,070: with a tenth of them the
feedback is still random when training starts, apart from decay, and trained feedback ends below fixed feedback."""
LONGER: Sizes = {"pretrain_epochs": 216}
"""The same where the full-size table has about 2,150, with quarter passes between epochs: with a tenth of the updates DFC
diverges in three of three seeds, and with whole passes between epochs two of three do not learn."""

PAPER = Paper(
    title="Credit assignment in neural networks through deep feedback control",
    reference=(
        "Meulemans, Tristany Farinha, Garcia Ordóñez, Vilimelis Aceituno, Sacramento and Grewe, "
        "NeurIPS 34, 2021, arXiv 2106.07887; "
        "strong feedback: Meulemans, Tristany Farinha, Cervera, Sacramento and Grewe, ICML 39, 2022, arXiv 2204.07249"
    ),
    studies=STUDIES,
    tables={
        "toy": own_study(
            "Deep feedback control on student-teacher regression",
            "apical_papers.dfc.toy.study",
            {"epochs": 2, "seeds": 1, "samples": 512},
            {"epochs": 150, "seeds": 5, "samples": 5000},
            {"epochs": 150, "seeds": 5, "samples": 5000},
            side_by_side=False,
            hours={"cpu": 0.42},
        ),
        "mnist": of("dfc-mnist", cut(256), {"epochs": 10, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "fashion": of("dfc-fashion", cut(256), FEW | LEARN | {"epochs": 10, "seeds": 3}, {"epochs": 100, "seeds": 5}),
        "autoencoder": of("dfc-autoencoder", cut(256), FEW | {"epochs": 5, "seeds": 1}, {"epochs": 25, "seeds": 5}),
        "train-loss": of("dfc-train-loss", cut(256), FEW | LONGER | {"epochs": 30, "seeds": 3}, {"epochs": 100, "seeds": 5}),
    },
)
