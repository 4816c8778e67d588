"""Child processes that start without importing PyTorch again, which takes seconds each."""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext, SpawnContext

import torch


def context(*modules: str) -> ForkServerContext | SpawnContext:
    """How child processes begin: on Linux forked from a server that imports PyTorch once, elsewhere each afresh.

    A forked process cannot use a GPU that the server has looked at, so they begin afresh where there is one, too. A server
    keeps the environment variables that it started with, so call :func:`adopt` first in a child, and its blocked signals.

    Args:
        modules: what the server imports besides PyTorch, if it has not begun.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch._dynamo", *modules])  # optimisers import the former at their first use
    return server


def adopt(environment: Mapping[str, str]) -> None:
    """Take over the parent's environment variables."""
    os.environ.clear()
    os.environ.update(environment)
