"""Hypothesis tries the same examples at every run; `--hypothesis-profile=default` draws new ones. One Ray cluster."""

import pytest
from hypothesis import settings

settings.register_profile("fixed", max_examples=40, derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture
def local_cluster() -> None:
    """Two Ray workers here, which tests of one process share, for a start takes ten seconds; it ends with the process."""
    pytest.importorskip("ray")
    from apical.evolution.workers import connected

    connected("local", 2)
