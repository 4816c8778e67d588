"""`apical evolve`: run an evolution from its flags, with a progress bar, in its folder, here or on a Ray cluster."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from apical import data
from apical.bench.evolve.loop import EvolutionFolder, classification, evolve, strategy
from apical.bench.evolve.recipe import EvolutionRecipe
from apical.bench.materials import located, model_for
from apical.bench.papers import evolutions
from apical.bench.progress import shown_path
from apical.bench.report.evolution import write
from apical.bench.run_folder import environment
from apical.bench.signals import Interrupted, StopSignals
from apical.cli.commands import stopped
from apical.cli.terminal import bar
from apical.errors import require_choice
from apical.evolution.strategy import Search
from apical.evolution.workers import Here, RayWorkers, Workers
from apical.models import own as own_models

if TYPE_CHECKING:
    from apical.cli.flags.evolve import Evolve


def run(flags: "Evolve", command: str) -> int:
    """Evolve a top-down network; return the exit status."""
    recipe, folder = identified(drafted(flags)), EvolutionFolder(flags.out)
    task = classification(recipe)
    Search(strategy(recipe), task.start)  # these two raise errors for invalid settings before anything is written
    for which in range(len(task.sets)):
        task.sample(recipe.seed, which)
    folder.check(recipe, resume=flags.resume, overwrite=flags.overwrite)
    held = folder.held(recipe, resume=flags.resume, overwrite=flags.overwrite)
    with StopSignals() as stop, closing(_workers(flags, recipe.chunk)) as workers, held as resume:
        around = environment("cpu", torch.get_num_threads())
        if not resume:
            folder.create(recipe, command, around)
        print(f"{task.start.numel()} weights, population {recipe.population}, {recipe.generations} generations")
        origin = {"command": command, "environment": around}
        with _shown(recipe) as show:

            def on_generation(line: dict[str, Any]) -> bool:
                show(line)
                return stop.signum is not None

            result = evolve(task, recipe, workers, folder, resume=resume, provenance=origin, on_generation=on_generation)
        if result is None:
            assert stop.signum is not None
            done = folder.lines()[-1]["generation"]
            return stopped(Interrupted(stop.signum, f"generation {done}"), command)
    print(f"teacher: {shown_path(folder.teacher)}")
    print(f"report: {shown_path(write(folder))}")
    return 0


def _workers(flags: "Evolve", chunk: int) -> Workers:
    return Here(chunk) if flags.ray is None else RayWorkers(flags.ray, flags.workers, chunk)


def drafted(flags: "Evolve") -> EvolutionRecipe:
    """Return the named recipe or the defaults, overridden by the given options."""
    names = EvolutionRecipe.__dataclass_fields__
    settings = {name: getattr(flags, name) for name in names if getattr(flags, name, None) is not None}
    if flags.recipe is None:
        return EvolutionRecipe(**settings)
    require_choice("evolution recipe", flags.recipe, evolutions())
    return replace(evolutions()[flags.recipe], **settings)


def identified(recipe: EvolutionRecipe) -> EvolutionRecipe:
    """Return the recipe with absolute paths and checksums of the user's own data and networks; describe the data."""
    pairs = [located({"data": name}) for name in recipe.data], [located({"model": name}) for name in recipe.model]
    sets, networks = (tuple(item[what] for item in places) for what, places in zip(("data", "model"), pairs, strict=True))
    loaded = [data.load(name) for name in sets if name not in data.names()]
    for item in loaded:
        print(item.about)
    sums = {item.name: item.sha256 for item in loaded}
    own = {name: own_models.checksum(name) for name in networks if own_models.is_own(name)}
    for name in own:
        model_for(name, data.load(sets[0]))
    return replace(
        recipe,
        data=sets,
        model=networks,
        data_sha256=tuple(sums.get(name, "") for name in sets) if sums else (),
        model_sha256=tuple(own.get(name, "") for name in networks) if own else (),
    )


@contextmanager
def _shown(recipe: EvolutionRecipe) -> Iterator[Any]:
    """Yield a function that shows a generation: a bar with the fitness in a terminal, otherwise a line every tenth part."""
    part = max(1, recipe.generations // 10)

    def text(line: dict[str, Any]) -> str:
        center = "nan" if line["center"] is None else f"{line['center']:.4f}"
        return f"fitness {center} (best {line['best']:.4f}, mean {line['mean']:.4f})"

    if not Console().is_terminal:

        def on_line(line: dict[str, Any]) -> None:
            if line["generation"] % part == 0 or line["generation"] in (1, recipe.generations):
                print(
                    f"generation {line['generation']}/{recipe.generations}  {text(line)}  {line['seconds']:.2f} s",
                    flush=True,
                )

        yield on_line
        return
    columns = (TextColumn("generation"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with bar(recipe.generations, "", *columns, transient=False) as update:
        yield lambda line: update(completed=line["generation"], description=text(line))
