"""The training loop for one rule, one recipe and one run folder; resumable bit for bit at every step."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apical.bench import checkpoint, provenance
from apical.bench.compilation import CompiledStep, check_compiler
from apical.bench.distributed import World, place
from apical.bench.materials import build_model
from apical.bench.measure import (
    FACTOR,
    FIELDS,
    alignment,
    autocast,
    chance_loss,
    evaluate,
    examples,
    finite,
    has_diverged,
    matrices,
    minimum_norm,
    own_measures,
    panels,
    per_token,
    probe_batch,
)
from apical.bench.network import SAMPLES, measured, moments_of_training
from apical.bench.optimizer import begin_pass, end_pass, make_optimizer, scheduled, set_rate, shape_gradients
from apical.bench.passes import Pass, passes, total_steps
from apical.bench.recipe import Recipe, differences
from apical.bench.report import placement as placement_section
from apical.bench.report import sample
from apical.bench.restore import check_line, check_place, not_finite, restore_optimizer, restore_partial, restore_rule
from apical.bench.run_folder import RunFolder
from apical.bench.signals import Interrupted, StopSignals
from apical.bench.state import brief, write_state
from apical.bench.sums import Sums
from apical.bench.timing import StepCost, StepTimer, peak_memory, step_cost
from apical.bench.trajectory import Recorder
from apical.core.credit import CreditRule, Phase
from apical.data import Augment, Dataset, Split
from apical.errors import CheckpointError, ConfigError, DivergenceError, InstabilityError

MakeRule = Callable[[Recipe, nn.Module, tuple[int, ...]], CreditRule]
"""Builds the recipe's rule around a model for samples of a shape; importable by name, so that workers can receive it."""

_LAST = ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss", "train_loss", "multiply_adds")
_TIMES = ("ms_per_step", "feedback_ms_per_step")
CHECK_EVERY = 20
"""Steps between checks of loss and signals where a check is expensive: on a GPU, or with several processes."""


class Training:
    """One training, defined by its recipe. It does not touch the disk before :meth:`start`.

    Args:
        recipe: what to train, with the rule's defaults filled in.
        dataset: its data; moved to the device if necessary.
        make_rule: builds the rule; called right after the model is drawn from the recipe's seed.
        folder: the run's folder.
        world: this process's rank under torchrun.
        stop: signals that are checked between steps; None checks none.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the epoch in progress, over all its passes.
        steps_per_epoch: steps of an epoch in which the forward weights learn.
        rule: the rule, on the device.
        line: metrics of the last finished epoch.

    Raises:
        ConfigError: loss and data, or feedback passes and rule, do not match.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        make_rule: MakeRule,
        folder: RunFolder,
        world: World,
        stop: StopSignals | None = None,
    ) -> None:
        self.recipe, self.folder, self.world, self.device = recipe, folder, world, world.device
        self.stop = stop or StopSignals()
        recipe.check_targets(are_numbers=dataset.is_regression, are_tokens=dataset.is_sequences)
        if recipe.compile:
            check_compiler(self.device)
        self.steps_per_epoch = recipe.steps_per_epoch(len(dataset.train))
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.line: dict[str, Any] = {}
        self.peak_memory_mb: float | None = None
        self.augment = Augment(flip=recipe.flip, crop=recipe.crop) if recipe.flip or recipe.crop else None
        self._rng: dict[str, Any] | None = None  # saved while another run uses the global generators
        with self._own_randomness():
            checkpoint.seed_all(recipe.seed)
            model = build_model(recipe, dataset)
            self.rule = make_rule(recipe, model, dataset.input_shape).to(self.device)
        recipe.check_phases(two_phase=self.rule.learns_apart)
        self.optimizer = make_optimizer(recipe, self.rule)
        every, forward_steps = recipe.trajectory if world.is_main else 0, recipe.epochs * self.steps_per_epoch
        self.trajectory = Recorder(folder.trajectory, self.rule.model, every, forward_steps)
        self.dataset = place(dataset, self.device)
        self.module = self._shared()
        self._timer, self._feedback_timer = StepTimer(self.device), StepTimer(self.device)
        self._measured_at = set(moments_of_training(recipe.epochs).values())
        self._signum, self._costs = 0, dict[Phase, StepCost]()
        self._sums = Sums(world, classes=dataset.counts_hits, answers=dataset.train.answers)
        self._untrained = chance_loss(self.rule, self.dataset.test, dataset.output_shape)

    @property
    def lr(self) -> float:
        """Learning rate of the current epoch."""
        return scheduled(self.recipe, self.epoch)[0]

    @property
    def passes(self) -> list[Pass]:
        """The passes of the current epoch."""
        return passes(self.recipe, self.epoch + 1, self.steps_per_epoch)

    @property
    def steps_done(self) -> int:
        """Steps of all passes so far."""
        return total_steps(self.recipe, self.epoch, self.steps_per_epoch) + self.step

    @property
    def steps_planned(self) -> int:
        """Steps of all passes in all epochs."""
        return total_steps(self.recipe, self.recipe.epochs, self.steps_per_epoch)

    def start(self, *, resume: bool, command: str, notes: list[str], environment: Mapping[str, Any] | None = None) -> None:
        """Continue from the folder's checkpoint, or create the folder and measure epoch 0.

        Args:
            environment: machine and versions to record; None detects them.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another run.
            OSError: the folder cannot be written.
        """
        if self.world.is_main:
            self.folder.lock()
        if resume:
            self._restore(checkpoint.load(self.folder.checkpoint))
        self.world.barrier()
        if self.world.is_main and resume:
            self.folder.rewind_metrics(self.line)
            self.folder.result.unlink(missing_ok=True)
            self.folder.write_config(self.recipe, command=command, notes=notes)
            if self.epoch == self.recipe.epochs:  # it was killed between its last checkpoint and its end
                self._keep_pictures()
        elif self.world.is_main:
            if environment is None:
                environment = provenance.environment(str(self.device), torch.get_num_threads(), self.world.size)
            around = {**environment, "data_source": self.dataset.source}
            self.folder.create(self.recipe, command=command, notes=notes, environment=around)
            placement_section.keep(self.folder.path, self.rule, self.dataset.train.inputs)
        if not resume:
            self.trajectory.see(0)
            self._finish_epoch(trained=False)

    def train_epoch(self, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Train to the end of the current epoch, measure, save; return the epoch's metrics line.

        Raises:
            Interrupted: a signal was received; the step is finished and saved.
            DivergenceError: NaN or infinity occurred; it is recorded in result.json and the last checkpoint is kept.
        """
        if self.recipe.has_feedback_passes and self.world.size > 1:
            # DDP would otherwise treat parameters used by measurements as used in the next step
            self.module = self._shared()
        with self._own_randomness(), peak_memory(self.device, self.rule, self.optimizer) as peak:
            self.rule.train()
            self._began = time.perf_counter()
            try:
                for current in self.passes:
                    self._train_pass(current, on_step)
                self._count_time()
                costs = self._step_costs()
                if self.peak_memory_mb is None and self.device.type == "cpu":
                    self.peak_memory_mb = max(cost.megabytes for cost in costs.values())
            except InstabilityError as error:
                self._diverge(str(error), remedy="")
        if peak.megabytes is not None:
            self.peak_memory_mb = max(self.peak_memory_mb or 0.0, peak.megabytes)
        self._finish_epoch(trained=True)
        if self._signum and self.epoch < self.recipe.epochs:
            raise Interrupted(self._signum, f"the end of epoch {self.epoch}")
        return self.line

    def result(self, status: str = "finished", message: str | None = None) -> dict[str, Any]:
        """Return the content of result.json; `ratio_to_bp` is filled in by a comparison."""
        lines = self.folder.read_metrics()
        times = {key: [line[key] for line in lines if line.get(key) is not None] for key in _TIMES}
        result = {
            "rule": self.recipe.rule_name,
            "seed": self.recipe.seed,
            "epochs": self.epoch,
            **{key: self.line.get(key) for key in _LAST},
            **{key: statistics.median(values) if values else None for key, values in times.items()},
            "ratio_to_bp": None,
            "peak_memory_mb": self.peak_memory_mb,
            "parameters": sum(p.numel() for p in self.rule.model.parameters()),
            "n_train": len(self.dataset.train),
            "n_test": len(self.dataset.test),
            "steps_per_epoch": self.steps_per_epoch,
            "seconds": self.seconds,
            "config_hash": self.recipe.hash(),
            "status": status,
        }
        if self.dataset.is_text:
            result |= per_token(self.line.get("test_loss"))
        return result if message is None else {**result, "message": message}

    def _shared(self) -> nn.Module:
        """Return the rule, compiled if the recipe says so, with gradients averaged over the processes."""
        rule = self._compiled() if self.recipe.compile else self.rule
        if self.world.size == 1:
            return rule
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(rule, device_ids=ids, find_unused_parameters=self.recipe.has_feedback_passes)

    def _compiled(self) -> nn.Module:
        samples = slice(self.recipe.batch_size)
        inputs, targets = self.dataset.train.inputs[samples], self.dataset.train.targets[samples]
        with self._own_randomness(), autocast(self.device, self.recipe.amp):
            return CompiledStep(self.rule, inputs, targets)

    def _train_pass(self, current: Pass, on_step: Callable[[int], None] | None) -> None:
        """Train the remaining steps of one pass."""
        if self.step >= current.end:
            return
        begin_pass(self.optimizer, self.recipe, current)
        self.rule.phase = current.phase
        order = current.order(len(self.dataset.train), self.recipe.seed).to(self.device)
        while self.step < current.end:
            self._train_step(current, *self._batch(current, order, self.step - current.first))
            self.step += 1
            if current.is_main:
                self.trajectory.see(self.epoch * self.steps_per_epoch + self.step - current.first)
            if self.step == current.end:
                end_pass(self.optimizer, self.recipe, current)
            if on_step is not None:
                on_step(self.step)
            self._between_steps(current)

    def _batch(self, current: Pass, order: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return this process's share of batch `step` of a pass: inputs (n, ...) and targets (n,) or (n, outputs)."""
        size = self.recipe.batch_size
        samples = order[step * size : (step + 1) * size]
        inputs, targets = self.dataset.train.inputs[samples], self.dataset.train.targets[samples]
        if self.augment is not None:  # on the whole batch, so that the result does not depend on the number of processes
            inputs = self.augment(inputs, current.augmentation(self.device, self.recipe.seed, step))
        return self.world.own_slice(inputs), self.world.own_slice(targets)

    def _train_step(self, current: Pass, inputs: Tensor, targets: Tensor) -> None:
        done = self.epoch * self.steps_per_epoch + self.step - current.first
        timer = self._timer if current.is_main else self._feedback_timer
        timer.start()
        if current.is_main:
            set_rate(self.optimizer, self.recipe, done, self.steps_per_epoch)
        first = None
        self.rule.restart()
        for _ in range(self.rule.repeats):
            self.optimizer.zero_grad()
            with autocast(self.device, self.recipe.amp):
                credit = self.module(inputs, targets)
            credit.backward()
            shape_gradients(self.optimizer, self.recipe, done if current.is_main else None)
            self.optimizer.step()
            self.rule.constrain_()
            first = first or credit  # the loss of a batch is that before its updates
        timer.stop()
        if current.is_main:
            self._sums.add(first or credit, targets)
        self._sums.log(credit.logs)

    def _step_costs(self) -> dict[Phase, StepCost]:
        """Return the cost of a step by phase; measured once, then counted for every step of the epoch."""
        for current in {item.phase: item for item in self.passes if item.phase not in self._costs}.values():
            self.rule.phase = current.phase
            order = current.order(len(self.dataset.train), self.recipe.seed)
            with autocast(self.device, self.recipe.amp):
                self._costs[current.phase] = step_cost(self.rule, self.optimizer, *self._batch(current, order, 0))
        return self._costs

    def _between_steps(self, current: Pass) -> None:
        """Check for NaN and signals; save if the recipe asks for it."""
        every, last = self.recipe.checkpoint_steps, self.step == self.passes[-1].end
        save = bool(every) and self.step % every == 0 and not last
        cheap = self.device.type == "cpu" and self.world.size == 1
        if not (cheap or save or self.step == current.end or self.step % CHECK_EVERY == 0):
            return
        if not math.isfinite(self._sums.total_loss()):
            self._diverge("the training loss is not finite")
        if self.step == current.end and not current.is_main:  # the loss does not reveal diverged feedback weights
            self._check_parameters()
        self._signum = self.world.largest(self.stop.signum or 0)
        if (save or self._signum) and not last:
            self._check_parameters()
            self._count_time()
            self._save()
            if self._signum:
                kind = "" if current.is_main else f" ({current.kind} pass)"
                raise Interrupted(self._signum, f"epoch {self.epoch + 1}, step {self.step}{kind}")

    def _finish_epoch(self, *, trained: bool) -> None:
        """Measure, check, save, append the line."""
        loss, accuracy, logs = self._sums.means()
        self.rule.phase = "forward" if self.recipe.feedback_passes else "both"
        with self._own_randomness():
            test_loss, test_accuracy = self._evaluate(self.dataset.test)
            held_out, validation_loss, validation_accuracy = self.dataset.validation, None, None
            if held_out is not None:
                validation_loss, validation_accuracy = self._evaluate(held_out)
            probe = self.recipe.probe if self.world.is_main else 0
            layers = alignment(self.rule, self.dataset.train, probe)
            angle = minimum_norm(self.rule, self.dataset.train, probe)
            own = own_measures(self.rule, self.dataset.train, self.dataset.test, probe)
        if not math.isfinite(test_loss):
            remedy = None if trained else "No step was taken: check the data, the model and its initial weights"
            self._diverge("the test loss is not finite", remedy)
        self._untrained = self._untrained if trained else max(self._untrained, test_loss)
        if has_diverged(loss, test_loss, self._untrained):
            self._diverge(f"the training loss rose to {loss:.4g}, over {FACTOR:g} times that of an untrained network")
        self._check_parameters()
        lr, decay = scheduled(self.recipe, self.epoch)
        self.line = {
            "epoch": self.epoch + trained,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "ms_per_step": self._timer.median(),
            "feedback_ms_per_step": self._feedback_timer.median(),
            "seconds": self.seconds,
            "multiply_adds": self._multiply_adds() if trained else 0,
            "lr": lr,
            "weight_decay": decay,
            "logs": logs,
            "layers": layers,
            "depths": dict(own.depths),
            "minimum_norm_alignment": angle,
            "condition_two": None,
        }
        if self.world.is_main and self.line["epoch"] in self._measured_at:
            if self.recipe.measure:
                inputs, _ = probe_batch(self.dataset.train, SAMPLES)
                self.line["measured"] = measured(self.recipe.measure, self.rule.model, inputs)
            if tables := matrices(self.rule, self.dataset.train, probe):
                self.line["matrices"] = tables
        clash = own.network.keys() & (self.line.keys() - {"condition_two"})
        clash |= {key for values in own.layers.values() for key in values if key in FIELDS}
        if clash:
            raise ConfigError(f"{type(self.rule).__name__}.measures: the name {min(clash)!r} is reserved; rename it")
        for name, values in own.layers.items():
            layers.setdefault(name, {}).update({key: finite(value) for key, value in values.items()})
        self.line |= {key: finite(value) for key, value in own.network.items()}
        self.epoch, self.step = self.epoch + trained, 0
        self._sums.clear()
        self._timer.clear()
        self._feedback_timer.clear()
        self._save()
        if self.world.is_main:
            self.folder.append_metrics(self.line)
            if self.epoch == self.recipe.epochs:
                self._keep_pictures()

    def _keep_pictures(self) -> None:
        """Save what the report shows of the trained network: reconstructions or generated text, and its own figures."""
        self.folder.write_examples(examples(self.rule, self.dataset.test))
        sample.keep(self.folder.path, self.rule, self.dataset)
        with self._own_randomness():
            self.folder.write_panels(panels(self.rule, self.dataset.train, self.recipe.probe))

    def _evaluate(self, split: Split) -> tuple[float, float | None]:
        return evaluate(self.rule, split, self.recipe.amp, self.world, counts_hits=self.dataset.counts_hits)

    def _multiply_adds(self) -> int:
        """Return the totals over all steps so far and all processes."""
        taken = sum(item.steps * self._costs[item.phase].multiply_adds for item in self.passes)
        return int(self.line.get("multiply_adds") or 0) + self.world.size * taken

    def _count_time(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds, self._began = self.seconds + now - self._began, now

    def _check_parameters(self) -> None:
        if name := not_finite(self.rule):
            self._diverge(f"parameter {name} is not finite")

    def _diverge(self, what: str, remedy: str | None = None) -> NoReturn:
        rest = f"the last good checkpoint (epoch {self.line['epoch']}) is kept" if self.line else "nothing was saved"
        if remedy is None:
            transformer = self.dataset.is_sequences and self.recipe.optimizer == "sgd"
            remedy = "Try --optimizer adamw, or a smaller --lr" if transformer else "Try a smaller --lr"
        message = (
            f"{self.recipe.rule_name} with seed {self.recipe.seed} diverged in epoch {self.epoch + 1}, step {self.step}, at "
            f"lr {self.lr:g}: {what.rstrip('.')}; {rest}. {remedy}"
        ).rstrip()
        if self.world.is_main:
            write_state(self.folder.result, self.result("diverged", message))
        raise DivergenceError(message)

    def _save(self) -> None:
        sums = self._sums.state()
        if not self.world.is_main:
            return
        self.folder.check_held()
        self.trajectory.save()
        times = {"times": self._timer.times(), "feedback_times": self._feedback_timer.times()}
        state = {
            "config": self.recipe.to_json(),
            "rule": dict(self.rule.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "rng": self._rng if self._rng is not None else checkpoint.rng_state(self.device),
            "epoch": self.epoch,
            "step": self.step,
            "partial": {**sums, **times, "snapshots": len(self.trajectory.steps), "untrained": self._untrained},
            "seconds": self.seconds,
            "metrics": self.line,
            "peak_memory_mb": self.peak_memory_mb,
        }
        checkpoint.save(self.folder.checkpoint, state)

    def _restore(self, state: dict[str, Any]) -> None:
        path = self.folder.checkpoint
        if unlike := differences(state["config"], self.recipe.to_json()):
            raise CheckpointError(f"checkpoint {path} has other options (saved vs given): {'; '.join(unlike)}")
        field = "step"
        try:
            check_place(self.recipe, state["epoch"], state["step"], self.steps_per_epoch)
            field = "rule"
            restore_rule(self.rule, state["rule"])
            field = "optimizer"
            restore_optimizer(self.optimizer, state["optimizer"])
            field = "partial"
            snapshots, untrained = restore_partial(state["partial"], self._sums, self._timer, self._feedback_timer)
            field = "metrics"
            check_line(state["metrics"], state["epoch"])
            field = "rng"
            with self._own_randomness():
                checkpoint.set_rng_state(state["rng"], self.device)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"checkpoint {path}: field {field!r} does not fit this run ({brief(error)})") from error
        self.trajectory.restore(snapshots)
        self._untrained = max(self._untrained, untrained)
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.line, self.peak_memory_mb = state["metrics"], state["peak_memory_mb"]

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Give this run separate global generators within the block, so that interleaved runs do not affect each other."""
        others, own, self._rng = checkpoint.rng_state(self.device), self._rng, None
        if own is not None:
            checkpoint.set_rng_state(own, self.device)
        try:
            yield
        finally:
            self._rng = checkpoint.rng_state(self.device)
            checkpoint.set_rng_state(others, self.device)
