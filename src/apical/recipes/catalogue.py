"""All studies by name, as `apical list recipes` shows them."""

from apical.recipes import ccl, corinfomax, dfc, equilibrium, pfa, target_propagation
from apical.recipes.study import Study

STUDIES: dict[str, Study] = {
    **pfa.STUDIES,
    **dfc.STUDIES,
    **ccl.STUDIES,
    **target_propagation.STUDIES,
    **equilibrium.STUDIES,
    **corinfomax.STUDIES,
}
