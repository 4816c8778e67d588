"""Figure 3 of product feedback alignment (arXiv 2405.20594): alignment against the expansion ratio, without training.

At the fixed point R = B^T W the path B R = B B^T W has an angle of arctan(1/sqrt(lambda)) to W, and the eigenvalues of B B^T
have mean 1 and standard deviation 1/sqrt(lambda). Run `python -m apical_papers.pfa.theory --out results/pfa-theory.json`.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apical.bench.run_folder import environment
from apical.diagnostics.alignment import angle, norm_ratio
from apical.rules.plastic_feedback.product_feedback_alignment import expansion_matrix

EXPANSIONS = tuple(10 ** (k / 5) for k in range(11))
"""Eleven values from 1 to 100, evenly spaced in the logarithm."""

TOLERANCE = 1.0  # degrees


def theory(draws: int = 100, n_out: int = 100, n_in: int = 256, seed: int = 0) -> list[dict[str, Any]]:
    """Return one row per expansion ratio: mean and standard deviation of the angle over `draws`, and the theoretical values.

    Returns:
        Rows with `expansion`, `angle`, `angle_std` and `angle_theory` in degrees, `norm_ratio`, `norm_ratio_theory`,
        `eigenvalue_mean`, `eigenvalue_std`, `eigenvalue_std_theory`, `n` and `verdict`.
    """
    torch.manual_seed(seed)
    rows = []
    for expansion in EXPANSIONS:
        m = round(expansion * n_out)
        angles, ratios, means, deviations = [], [], [], []
        for _ in range(draws):
            w = nn.init.xavier_uniform_(torch.empty(n_out, n_in))
            b = expansion_matrix(n_out, m, 1, 1.0, w)
            path = b @ (b.T @ w)
            angles.append(angle(path, w))
            ratios.append(norm_ratio(path, w))
            eigenvalues = torch.linalg.eigvalsh((b @ b.T).double())
            means.append(float(eigenvalues.mean()))
            deviations.append(float(eigenvalues.std(correction=0)))
        mean = sum(angles) / draws
        predicted = math.degrees(math.atan(1 / math.sqrt(expansion)))
        rows.append(
            {
                "expansion": expansion,
                "angle": mean,
                "angle_std": math.sqrt(sum((a - mean) ** 2 for a in angles) / max(draws - 1, 1)),
                "angle_theory": predicted,
                "norm_ratio": sum(ratios) / draws,
                "norm_ratio_theory": math.sqrt(1 + 1 / expansion),
                "eigenvalue_mean": sum(means) / draws,
                "eigenvalue_std": sum(deviations) / draws,
                "eigenvalue_std_theory": 1 / math.sqrt(expansion),
                "n": draws,
                "verdict": "reproduced" if abs(mean - predicted) <= TOLERANCE else "not reproduced",
            }
        )
    return rows


def verdicts(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the file as verdicts on the angle."""
    return [
        {
            "rule": "pfa",
            "what": f"angle of the path to the weight, expansion {row['expansion']:.3g}, °",
            "mark": f"{row['angle_theory']:.2f} ± {TOLERANCE:g}",
            "source": "theory",
            "mean": row["angle"],
            **row,
        }
        for row in content["rows"]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the rows as one JSON file."""
    parser = argparse.ArgumentParser(description="PFA's alignment against the expansion ratio (no training)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--draws", type=int, default=100, help="random draws per expansion ratio")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = theory(draws=options.draws, seed=options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "title": "Product feedback alignment: the angle follows the expansion ratio",
        "about": "Angle between the path B R and the weight W (100 x 256) at the fixed point R = B^T W, in degrees, over "
        "random draws, against arctan(1/sqrt(expansion)); reproduced means within one degree.",
        "command": f"python -m apical_papers.pfa.theory --out {options.out} --draws {options.draws} --seed {options.seed}",
        "environment": environment("cpu", torch.get_num_threads()),
        "rows": rows,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print("{expansion:8.2f}  {angle:6.2f} +- {angle_std:.2f}  theory {angle_theory:6.2f} degrees".format(**row))


if __name__ == "__main__":
    main()
