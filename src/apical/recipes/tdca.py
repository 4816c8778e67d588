"""Top-down credit assignment (arXiv 2208.01416): the evolutions behind its shipped teachers.

The paper's numbers could not be read, so there are none to compare with; tdca_classification has the controls.
"""

from dataclasses import replace

from apical.experiment.evolution_recipe import EvolutionRecipe

FIRST = EvolutionRecipe(
    data=("digits",),
    model=("mlp-32-32", "mlp-tanh-32-32"),
    sites=10,
    relative=True,
    quiet=True,
    hidden=20,
    examples=512,
    steps=60,
    lr=0.01,
    batch_size=64,
    generations=700,
    step=0.2,
    decay=0.9965,
    chunk=65,
)

EVOLUTIONS: dict[str, EvolutionRecipe] = {
    "digits-first": FIRST,
    "digits": replace(
        FIRST,
        begin="digits-first",
        optimizer="sgd",
        steps=300,
        lr=0.02,
        batch_size=32,
        generations=300,
        sigma=0.05,
        step=0.1,
        decay=0.992,
    ),
}
"""Recipes of `apical evolve --recipe NAME`; the teacher of that name is shipped with the package.

The first is evolved in short lifetimes under Adam, which makes equal steps of whatever credit, so that its direction alone
is selected for. The second goes on from it in long lifetimes, trained as `apical train` does: sizes and stability count."""
