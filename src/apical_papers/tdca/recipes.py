"""Top-down credit assignment (arXiv 2208.01416): the evolutions behind its shipped teachers.

The paper's numbers could not be read, so there are none to compare with; the classification study has the controls.
"""

from dataclasses import replace

from apical.bench.evolve.recipe import EvolutionRecipe

_SHIPPED = EvolutionRecipe(
    data=("digits",), begin="wired", quiet=False, steps=100, lr=0.05, optimizer="sgd", batch_size=32, step=0.3, chunk=65
)
EVOLUTIONS: dict[str, EvolutionRecipe] = {
    "digits": replace(
        _SHIPPED,
        model=("mlp-32-32", "mlp-tanh-32", "mlp-32-32-32", "mlp-tanh-32-32-32-32"),
        sites=32,
        hidden=20,
        examples=512,
        generations=36,
        sigma=0.05,
        step=0.15,
        decay=0.99,
    ),
    "classes": replace(
        _SHIPPED,
        model=("mlp-32", "mlp-tanh-64", "mlp-48-48", "mlp-tanh-32-32-32", "mlp-32-32-32-32"),
        by_class=True,
        hidden=8,
        examples=256,
        tasks=4,
        settled=10,
        generations=64,
    ),
    "mnist-residual": EvolutionRecipe(
        data=("mnist",),
        model=("mlp-residual-100-100-100",),
        hidden=30,
        relative=False,
        credit="probabilities",
        quiet=False,
        starts="fixed",
        examples=0,
        steps=150,
        lr=0.01,
        generations=2000,
        population=800,
        step=0.1,
        chunk=4,
    ),
}
"""Recipes of `apical evolve --recipe NAME`: those of the shipped teachers "digits" and "classes", and the authors' regime,
in which a generation is 120,000 passes over MNIST. Run it on a GPU, in parts (`--resume`), or scaled down."""
