"""The theory behind PFA holds for the matrices the rule draws (spec section 5.1 A)."""

import math

import pytest

from apical_papers.pfa.theory import theory


def test_angles_follow_the_expansion_ratio() -> None:
    rows = theory(draws=20)
    assert [round(row["expansion"], 2) for row in rows] == [1, 1.58, 2.51, 3.98, 6.31, 10, 15.85, 25.12, 39.81, 63.1, 100]
    for row in rows:
        ratio = row["expansion"]
        assert row["angle"] == pytest.approx(math.degrees(math.atan(ratio**-0.5)), abs=1.0)
        assert row["norm_ratio"] == pytest.approx(math.sqrt(1 + 1 / ratio), rel=0.02)
        assert row["eigenvalue_mean"] == pytest.approx(1.0, abs=0.02)
        assert row["eigenvalue_std"] == pytest.approx(ratio**-0.5, rel=0.05)
        assert row["verdict"] == "reproduced"
