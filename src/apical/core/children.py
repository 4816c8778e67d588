"""Child processes that start without importing PyTorch again, which takes seconds each."""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext, SpawnContext

import torch


def context(*modules: str) -> ForkServerContext | SpawnContext:
    """Return the start method of child processes: on Linux a fork of a server that imports PyTorch once, elsewhere a spawn.

    A forked process cannot use a GPU that the server has looked at, so they begin afresh where there is one, too. A server
    keeps the environment variables that it started with, so call :func:`adopt` first in a child, and its blocked signals.

    Args:
        modules: what the server imports in addition to PyTorch, if it has not started yet.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch._dynamo", *modules])  # optimisers import torch._dynamo at their first use
    return server


def adopt(environment: Mapping[str, str]) -> None:
    """Copy the parent's environment variables."""
    os.environ.clear()
    os.environ.update(environment)
