"""Tables of transformers and sequences."""

from functools import partial

from apical.bench.papers import Paper, Sizes, own_study, table_of
from apical_papers.transformers.recipes import EPOCHS, STUDIES

of = partial(table_of, STUDIES)
alone = partial(own_study, side_by_side=False)
_SMOKE: Sizes = {"epochs": 1, "seeds": 1, "train_limit": 128, "test_limit": 32}

PAPER = Paper(
    title="Direct feedback alignment scales to modern deep learning tasks and architectures",
    reference=(
        "Launay, Poli, Boniface and Krzakala, NeurIPS 33, 2020, arXiv 2006.12878; "
        "scaling: Filipovich, Cappelli, Hesslow and Launay, 2022, arXiv 2210.14593"
    ),
    studies=STUDIES,
    tables={
        "text-python": of("text-python", _SMOKE, {"epochs": EPOCHS, "seeds": 5}, {"epochs": EPOCHS, "seeds": 5}),
        "lstm-copy": of("lstm-copy", _SMOKE, {"epochs": 10, "seeds": 5}, {"epochs": 10, "seeds": 5}),
        "language": alone(
            "Credit rules on a small language model, each at its best learning rate",
            "apical_papers.transformers.language",
            *({"steps": 4, "seeds": 2, "width": 32}, {"steps": 400, "seeds": 3}, {"seeds": 5}),
        ),
        "language-4x256": alone(
            "Rules with aligned feedback on a larger language model, four blocks and width 256",
            "apical_papers.transformers.larger",
            *({"steps": 4, "seeds": 2, "width": 32}, {"steps": 200, "seeds": 2}, {"steps": 400, "seeds": 5}),
        ),
        "scaling": alone(
            "Loss against width of a small language model, by rule",
            "apical_papers.transformers.scaling",
            *({"steps": 4, "seeds": 2}, {"steps": 400, "seeds": 5}, {"steps": 400, "seeds": 5}),
            hours={"cpu": 0.54},
        ),
    },
)
