"""The folders that are searched for data sets."""

import os
from pathlib import Path

from apical.errors import DataError


def cache_folder() -> Path:
    """Return $APICAL_CACHE or the user's cache folder for apical, which need not exist yet."""
    folder = os.environ.get("APICAL_CACHE")
    if folder:
        return Path(folder).expanduser()
    import pooch

    return Path(pooch.os_cache("apical"))


def roots(root: Path | None) -> list[tuple[str, Path]]:
    """Return the named folders to search: only `root` if given, otherwise $APICAL_DATA and the cache folder.

    Raises `DataError` if `root` is given but is not a folder.
    """
    if root is not None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise DataError(f"data folder {root} does not exist")
        return [("given folder", root)]
    places = [("cache folder", cache_folder())]
    folder = os.environ.get("APICAL_DATA")
    if folder:
        places.insert(0, ("$APICAL_DATA", Path(folder).expanduser()))
    return places
