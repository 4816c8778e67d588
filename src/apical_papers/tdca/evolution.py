"""Joint evolution from several meta-seeds, which costs less than one after the other, saved as it advances."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from apical.bench.checkpoint import read_sealed, write_sealed
from apical.errors import CheckpointError
from apical.evolution.seeds import seed_of
from apical.evolution.strategy import Search, Strategy

Task = TypeVar("Task")


def evolve(
    tasks: Sequence[Task],
    seeds: Sequence[int],
    starts: Sequence[Tensor],
    together: Callable[[Sequence[Task], Tensor, int], Tensor],
    strategy: Strategy,
    generations: int,
    path: Path,
    every: int = 1,
) -> dict[str, Any]:
    """Return centres of the search distributions, the mean fitness of each generation, and seconds.

    Args:
        tasks: one per meta-seed; they differ only in the meta-seed.
        seeds: the meta-seeds.
        starts: initial weights (D,) of each search.
        together: maps tasks, populations (S, P, D) and a generation to fitness (S, P).
        strategy: strategy of every search.
        generations: number of generations.
        path: file in which every `every`-th generation and the last are saved.
        every: interval of saved generations.

    Raises:
        CheckpointError: the file is damaged, or belongs to a longer evolution.
    """
    searches = [Search(strategy, start) for start in starts]
    done, seconds, curve = 0, 0.0, []
    if path.exists():
        saved = read_sealed(path, str(path))
        try:
            for search, state in zip(searches, saved["searches"], strict=True):
                search.restore(state)
            done, seconds, curve = saved["generation"], saved["seconds"], saved["curve"]
        except Exception as error:  # the state is the strategy's own
            raise CheckpointError(f"{path} is damaged ({error}); choose another --out") from error
    if done > generations:
        raise CheckpointError(f"{path} has {done} finished generations, more than the {generations} asked for")
    while done < generations:
        begun = time.perf_counter()
        drawn = [seed_of(seed, "population", done) for seed in seeds]
        populations = [search.ask(seed) for search, seed in zip(searches, drawn, strict=True)]
        fitness = together(tasks, torch.stack(populations), done)
        for search, population, scores in zip(searches, populations, fitness, strict=True):
            search.tell(population, scores)
        done += 1
        seconds += time.perf_counter() - begun
        curve.append(fitness.nanmean(1).tolist())
        if done % every == 0 or done == generations:
            states = [search.state() for search in searches]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(path, {"searches": states, "generation": done, "seconds": seconds, "curve": curve})
            text = " ".join(f"{value:.4g}" for value in curve[-1])
            print(f"{seconds:7.1f} s  {path.stem}, generation {done}: mean fitness {text}", flush=True)
    return {"centers": [search.center.tolist() for search in searches], "curve": curve, "evolution": round(seconds, 1)}
