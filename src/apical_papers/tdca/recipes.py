"""Top-down credit assignment (arXiv 2208.01416): the evolutions behind its shipped teachers.

The paper's numbers could not be read, so there are none to compare with; tdca_classification has the controls.
"""

from apical.bench.evolve.recipe import EvolutionRecipe

EVOLUTIONS: dict[str, EvolutionRecipe] = {
    "digits": EvolutionRecipe(
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
    ),
}
"""Recipes of `apical evolve --recipe NAME`; the teacher of that name is shipped with the package."""
