"""Small language models on the sources of Python's standard library, and recurrent nets on tasks that need memory.

Launay et al. (arXiv 2006.12878) trained a transformer of 6 layers and width 512 on WikiText-103; Filipovich et al. (arXiv
2210.14593) say that direct feedback alignment never pays on causal decoders. Ours are small: two blocks, windows of 64
characters, 400 steps, AdamW with decay on matrices only, a warm-up of 5 % and half a cosine to 10 %, gradients clipped at
norm 1 over the network. So their numbers are not comparable with ours.
"""

from dataclasses import replace

from apical.bench.recipe import Recipe
from apical.bench.study import Study, rows_of

EPOCHS, STEPS = 8, 50

LANGUAGE = Recipe(
    data="text-python",
    model="gpt-2x96",
    context=64,
    epochs=EPOCHS,
    epoch_steps=STEPS,
    batch_size=32,
    optimizer="adamw",
    lr=(1e-2,),
    lr_cosine=EPOCHS,
    lr_final=0.1,
    lr_warmup=20,
    beta2=0.98,
    weight_decay=(0.01,),
    decay_on="matrices",
    clip=1.0,
    clip_over="network",
    loss="token_cross_entropy",
    test_limit=512,
    probe=16,
)
"""400 steps on randomly drawn windows; an epoch is 50 steps."""

COPY = replace(LANGUAGE, data="copy", model="lstm-128", context=10, epochs=10, lr_cosine=10)
"""500 steps on sequences of five symbols."""

TAUGHT = {"rule_options": ("units=block", "teacher=classes"), "lr": (1e-3,)}
"""The shipped top-down network for any number of classes, at the rate found in the study of language models."""

STUDIES: dict[str, Study] = {
    "text-python": Study(
        "A decoder of two blocks, width 96, on the sources of Python's standard library, 400 steps",
        "about a minute on one CPU core",
        rows_of(LANGUAGE, ("bp", "kp-mirror", "pfa-mirror", "fa", "dfa")) | rows_of(LANGUAGE, {"tdca": TAUGHT}),
        LANGUAGE,
    ),
    "lstm-copy": Study(
        "An LSTM of 128 units says words of five symbols again, 500 steps",
        "about a minute on one CPU core",
        rows_of(COPY, ("bp", "fa", "kp-mirror", "pfa-mirror")),
        COPY,
    ),
}
