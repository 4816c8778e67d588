"""A pair of processes that stays: what is run on it runs on two gloo ranks, without the seconds that a start takes."""

import atexit
import contextlib
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from apical.core import children

PATIENCE = 300.0
"""Seconds after which a task that has not ended is given up."""


class RankError(RuntimeError):
    """A task raised an error on a rank, or a rank ended; the message has the rank's traceback."""


class Pair:
    """Two processes with a process group between them, each fed through a pipe."""

    def __init__(self) -> None:
        context = children.context()
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.folder.name, theirs), daemon=True)
            process.start()
            theirs.close()  # so that each side sees the other's end
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, message: bytes) -> list[Any]:
        """Hand a task to both ranks; returns what each returned."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # a rank that has ended is seen below
                pipe.send_bytes(message)
        answers: dict[int, Any] = {}
        while len(answers) < 2:
            ready = wait([pipe for rank, pipe in enumerate(self.pipes) if rank not in answers], PATIENCE)
            if not ready:
                raise RankError(f"the ranks did not end within {PATIENCE:g} s")
            for rank in [rank for rank, pipe in enumerate(self.pipes) if pipe in ready]:
                try:
                    failed, answers[rank] = pickle.loads(self.pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    raise RankError(f"rank {rank} ended before its task") from None
                if failed:  # the other rank may wait for this one for ever
                    raise RankError(f"rank {rank}: {answers[rank]}")
        return [answers[0], answers[1]]

    def end(self) -> None:
        """End both processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


_pair: Pair | None = None


def on_two_ranks(task: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `task(rank, *args)` on two gloo ranks, started at the first call; returns what each rank returned.

    Args:
        task: importable by name from `sys.path`, as are the contents of `args`.

    Raises:
        RankError: it raised an error there. The next call starts a new pair.
    """
    global _pair
    message = pickle.dumps((sys.path, torch.get_default_dtype(), pickle.dumps((task, args))))
    if _pair is not None and not all(process.is_alive() for process in _pair.processes):
        _give_up(_pair)
    if _pair is None:
        _pair = Pair()
        atexit.register(_pair.end)
    try:
        return _pair.run(message)
    except BaseException:
        _give_up(_pair)
        raise


def _give_up(pair: Pair) -> None:
    global _pair
    atexit.unregister(pair.end)
    pair.end()
    _pair = None


def _serve(rank: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(folder).as_posix()}/rendezvous", rank=rank, world_size=2)
    while True:
        try:
            sys.path[:], dtype, message = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError, KeyboardInterrupt):
            os._exit(0)  # gloo's destructor can wait for ever for a thread that waits for the interpreter lock
        torch.set_default_dtype(dtype)  # whatever the task before has left
        try:
            task, args = pickle.loads(message)
            answer = pickle.dumps((False, task(rank, *args)))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        pipe.send_bytes(answer)
