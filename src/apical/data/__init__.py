"""Data sets as normalised tensors: readers, checksummed downloads, augmentation.

`load` looks for a set under $APICAL_DATA and in the cache folder. `digits`, which is bundled with scikit-learn, and
`student-teacher` need neither.
"""

from apical.data.augment import Augment
from apical.data.dataset import Dataset, Split, check
from apical.data.fetching import fetch
from apical.data.loading import Status, load, names, status
from apical.data.roots import cache_folder

__all__ = ["Augment", "Dataset", "Split", "Status", "cache_folder", "check", "fetch", "load", "names", "status"]
