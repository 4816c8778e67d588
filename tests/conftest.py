"""Hypothesis tries the same examples at every run; `--hypothesis-profile=default` draws new ones. One Ray cluster."""

import gc
import importlib
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, set_forkserver_preload
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from matplotlib.figure import Figure
from tests.command import IMPORTED

from apical.core.wrappers import COMPILES

HERE = Path(__file__).parent
UNCOMPILED = "PyTorch before 2.13 does not compile rules"
settings.register_profile("fixed", max_examples=40, derandomize=True, deadline=None)
settings.load_profile("fixed")
torch.set_warn_always(True)  # else a warning of PyTorch's falls to whichever test of a process runs first


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers share the tests out by groups and pieces of files."""
    if config.getoption("dist") != "loadgroup":
        return None
    from tests.pieces import Pieces

    return Pieces(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers begin with what takes long: groups, and the tests at the top, which start processes; doctests come last.

    Ray's group is the last of the groups: its processes are nice, and starve beside Sphinx and mypy, which run at first.
    """

    for item in items:
        if not COMPILES and item.get_closest_marker("compiles"):
            item.add_marker(pytest.mark.skip(reason=UNCOMPILED))

    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        group = item.get_closest_marker("xdist_group")
        return group is None, group is not None and group.args == ("ray",), item.path.parent != HERE

    if hasattr(config, "workerinput"):
        items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """An old PyTorch keeps rules out of compiled graphs, which shows where a test wants one graph of it all."""
    try:
        return (yield)
    except Exception as error:
        if not COMPILES and "Unsupported" in (type(error).__name__, type(error.__context__).__name__):
            pytest.skip(UNCOMPILED)
        raise


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make the workers of pytest-xdist ready: what lasts is collected as garbage no more, and processes begin quickly."""
    if not hasattr(session.config, "workerinput"):
        return
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if session.config.getoption("loadgroup") and any("@" not in item.nodeid for item in grouped):
        raise pytest.UsageError("pytest-xdist and this pytest group no tests; install pytest<9.2")
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)  # by default 8 % of the time of compiled tests is spent looking for cycles
    if hasattr(torch._dynamo.config, "run_gc_after_compile"):  # not in the oldest versions
        torch._dynamo.config.run_gc_after_compile = False
    vars(torch._dynamo.config)["verbose"] = False  # read at each traced instruction, otherwise through a function
    importlib.import_module("torch._dynamo.guards").profile_guard_manager = lambda *_: 0.0  # takes 20 ms, for a log
    os.fsync = lambda file: None  # what tests write need not outlast a power cut; their commands' processes do wait for it
    if not torch.accelerator.is_available():  # for whose start a seed is noted with a stack trace, which takes 0.4 ms
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            kind.manual_seed_all = lambda seed: None
    set_forkserver_preload(list(IMPORTED))
    forkserver.ensure_running()


@contextmanager
def white() -> Iterator[None]:
    """Figures stay white and small, which saves a second for every report."""
    with patch.object(Figure, "draw", lambda *_: None), patch("apical.bench.figures.curves._DPI", 10):
        yield


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """White figures in tests that look at none."""
    with white():
        yield


@pytest.fixture
def undrawn_here() -> Iterator[None]:
    """Likewise in one test, where fixtures of its module draw."""
    with white():
        yield


@pytest.fixture
def local_cluster() -> None:
    """Two Ray workers here, which tests of one process share, for a start takes ten seconds; it ends with the process."""
    pytest.importorskip("ray")
    from apical.evolution.workers import connected

    connected("local", 2)
