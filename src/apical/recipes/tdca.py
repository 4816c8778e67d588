"""Top-down credit assignment (arXiv 2208.01416): the evolutions behind its shipped teachers.

The paper's numbers could not be read, so there are none to compare with; tdca_classification has the controls.
"""

from apical.experiment.evolution_recipe import EvolutionRecipe

EVOLUTIONS: dict[str, EvolutionRecipe] = {
    "digits": EvolutionRecipe(
        data=("digits",),
        model=("mlp-tanh-32-32",),
        sites=4,
        quiet=True,
        examples=256,
        steps=50,
        hidden=20,
        generations=250,
        chunk=66,
    ),
}
"""Recipes of `apical evolve --recipe NAME`; the teacher of that name is shipped with the package."""
