"""All studies by name, as `apical list recipes` shows them."""

from apical.recipes import ccl, dfc, pfa
from apical.recipes.study import Study

STUDIES: dict[str, Study] = {**pfa.STUDIES, **dfc.STUDIES, **ccl.STUDIES}
