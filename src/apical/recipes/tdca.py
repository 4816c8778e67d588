"""Top-down credit assignment (arXiv 2208.01416): the evolutions behind its shipped teachers.

The paper's numbers could not be read, so there are none to compare with; tdca_classification has the controls.
"""

from apical.experiment.evolution_recipe import EvolutionRecipe

EVOLUTIONS: dict[str, EvolutionRecipe] = {
    "digits": EvolutionRecipe(
        data=("digits",),
        model="mlp-tanh-48-48",
        sites=8,
        quiet=True,
        examples=0,
        steps=100,
        lr=0.02,
        optimizer="sgd",
        batch_size=32,
        generations=400,
        chunk=64,
    ),
}
"""Recipes of `apical evolve --recipe NAME`; the teacher of that name is shipped with the package."""
