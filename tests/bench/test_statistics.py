"""Bootstrap intervals and sign-flip tests, against what enumeration and theory say."""

import math

import numpy as np
import pytest

from apical.bench.statistics import bootstrap, paired, sign_flip


def test_all_resamples_of_two_values() -> None:
    found = bootstrap([0.0, 1.0])  # means 0, 1/2, 1/2, 1: the quantiles at 2.5 and 97.5 % lie between the outer two
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.0375)
    assert found.high == pytest.approx(1 - 0.0375)


def test_many_values_give_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400).tolist()
    found = bootstrap(values)
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert found.low == pytest.approx(np.mean(values) - half, abs=0.15 * half)
    assert found.high == pytest.approx(np.mean(values) + half, abs=0.15 * half)
    assert bootstrap(values) == found
    assert bootstrap(values, seed=1) != found


def test_intervals_cover_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = bootstrap(generator.normal(0.0, 1.0, 20).tolist())
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.0 <= found.high
    assert 0.87 <= inside / 200 <= 0.98  # percentile intervals of 20 values cover somewhat less than 95 %


def test_one_value_has_no_interval() -> None:
    assert bootstrap([2.0])[1:] == (None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_sign_flips_are_counted() -> None:
    assert sign_flip([1.0] * 5) == 2 / 32
    assert sign_flip([1.0, -1.0]) == 1.0
    assert sign_flip([3.0, 1.0, -1.0]) == 6 / 8  # of 5, 3, 3, 1 and their mirrors, all but 1 are 3 or more
    assert sign_flip([0.1, 0.2, 0.3]) == 0.25  # rounding does not split ties


def test_many_pairs_are_drawn() -> None:
    values = np.random.default_rng(2).normal(0.0, 1.0, 40)
    assert sign_flip((values - values.mean()).tolist()) > 0.9
    assert sign_flip((values + 2.0).tolist()) == pytest.approx(1 / 10_001)


def test_only_common_seeds_are_compared() -> None:
    found = paired({0: 1.0, 2: 5.0}, {1: 0.0, 2: 4.0})
    assert found is not None
    assert found.difference == (1.0, None, None, 1)
    assert paired({0: 1.0}, {1: 1.0}) is None
