"""Time and size of installing apical into a fresh environment, from a clone and pip's configured package index.

    python benchmarks/install.py [--torch VERSION] [--out benchmarks/install.json]

One row per version of PyTorch, whose builds with CUDA and for CPUs differ most. pip's cache is not used, so the time is
mostly that of the download.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import save

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"


def megabytes(folder: Path) -> int:
    """Return the size of the files in a folder, without links."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6)


def measure(folder: Path, torch: str | None) -> dict[str, object]:
    """Create an environment in `folder` and install apical there, with a version of PyTorch or the one that pip chooses.

    Raises:
        CalledProcessError: pip failed.
    """
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = [str(ROOT), f"torch=={torch}"] if torch else [str(ROOT)]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *asked], check=True, env=alone)
    seconds = time.perf_counter() - begun
    versions = json.loads(
        subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True, env=alone).stdout
    )
    return {
        "seconds": round(seconds, 1),
        "megabytes": megabytes(folder),
        "megabytes_of_torch": megabytes(next(folder.glob("lib/python*/site-packages/torch"))),
        "packages": len(versions),
        "python": platform.python_version(),
        "torch": versions["torch"],
        "build": "CUDA" if any(name.startswith("nvidia") for name in versions) else "CPU",
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="version; by default the one that pip chooses")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "install.json")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        row = measure(folder / "venv", options.torch)
    finally:
        shutil.rmtree(folder)
    kept = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    save(options.out, {"rows": [*(each for each in kept if each["torch"] != row["torch"]), row]})


if __name__ == "__main__":
    main()
