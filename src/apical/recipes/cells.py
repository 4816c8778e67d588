"""Parts of a study that are kept as they are finished, one JSON file each, so that nothing is computed twice or lost."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apical.errors import CheckpointError
from apical.experiment.run_folder import read_json, write_json


def kept(path: Path, config: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, from the file if one of the same configuration is there; with `seconds`, what making took.

    Raises:
        CheckpointError: the file is damaged, or of another configuration.
    """
    if path.exists():
        found = read_json(path)
        unlike = {key: value for key, value in config.items() if found.get("config", {}).get(key) != value}
        if unlike:
            raise CheckpointError(f"{path} was made with other settings than {unlike}; choose another --out")
        return found
    begun = time.perf_counter()
    made = make()
    content = {"config": dict(config), "seconds": round(time.perf_counter() - begun, 2), **made}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return content
