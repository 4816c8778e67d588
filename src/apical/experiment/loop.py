"""The training loop: one rule, one recipe, one run folder; resumable bit for bit at every step."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apical import models
from apical.core.credit import CreditRule
from apical.data import Augment, Dataset, Split
from apical.errors import CheckpointError, DivergenceError
from apical.experiment import checkpoint
from apical.experiment.distributed import World
from apical.experiment.measure import alignment, autocast, evaluate
from apical.experiment.recipe import Recipe, differences
from apical.experiment.run_folder import RunFolder, write_json
from apical.experiment.schedule import data_order, generator, piecewise
from apical.experiment.signals import Interrupted, StopSignals
from apical.experiment.timing import StepTimer, peak_memory, step_megabytes

MakeRule = Callable[[Recipe, nn.Module], CreditRule]
"""Builds the recipe's rule around a model; importable by name, so that worker processes can receive it."""

CHECK_EVERY = 20
"""Steps between looks at loss and signals where a look is costly: on a GPU, or with several processes."""


def place(dataset: Dataset, device: torch.device) -> Dataset:
    """The data set with all its tensors on `device`."""

    def moved(split: Split) -> Split:
        return replace(split, inputs=split.inputs.to(device), targets=split.targets.to(device))

    validation = None if dataset.validation is None else moved(dataset.validation)
    return replace(dataset, train=moved(dataset.train), validation=validation, test=moved(dataset.test))


def make_optimizer(recipe: Recipe, rule: CreditRule) -> torch.optim.Optimizer:
    """The recipe's optimiser over every trainable parameter of the rule, in one group, at the first epoch's values."""
    parameters = [parameter for parameter in rule.parameters() if parameter.requires_grad]
    lr, decay = recipe.lr[0], recipe.weight_decay[0]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=recipe.momentum, weight_decay=decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, betas=(recipe.momentum, 0.999), weight_decay=decay)


class Training:
    """One training from its recipe. It does nothing on disk before :meth:`start`.

    Args:
        recipe: what to train, with the rule's defaults filled in.
        dataset: its data; moved to the device if it is not there.
        make_rule: builds the rule; called right after the model is drawn from the recipe's seed.
        folder: where the run is kept.
        world: this process's place under torchrun.
        stop: signals to obey between steps; None obeys none.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the epoch in progress.
        rule: the rule, on the device.
        line: metrics of the last finished epoch.
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
        self.steps_per_epoch = recipe.steps_per_epoch(len(dataset.train))
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.line: dict[str, Any] = {}
        self.peak_memory_mb: float | None = None
        self.augment = Augment(flip=recipe.flip, crop=recipe.crop) if recipe.flip or recipe.crop else None
        self._rng: dict[str, Tensor] | None = None  # while another run has the global generators
        with self._own_randomness():
            torch.manual_seed(recipe.seed)
            model = models.build(recipe.model, dataset.input_shape, dataset.classes)
            self.rule = make_rule(recipe, model).to(self.device)
        self.optimizer = make_optimizer(recipe, self.rule)
        self.dataset = place(dataset, self.device)
        self.module: nn.Module = self.rule
        if world.size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.rule, device_ids=ids)
        self._timer = StepTimer(self.device)
        self._signum = 0
        self._clear_sums()

    @property
    def lr(self) -> float:
        """Learning rate of the epoch in progress."""
        return piecewise(self.recipe.lr, self.recipe.lr_epochs, self.epoch)

    @property
    def weight_decay(self) -> float:
        """Weight decay of the epoch in progress."""
        return piecewise(self.recipe.weight_decay, self.recipe.weight_decay_epochs, self.epoch)

    def start(self, *, resume: bool, command: str, notes: list[str], environment: dict[str, Any]) -> None:
        """Continue from the folder's checkpoint, or make the folder and measure epoch 0.

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
        elif self.world.is_main:
            around = {**environment, "data_source": self.dataset.source}
            self.folder.create(self.recipe, command=command, notes=notes, environment=around)
        if not resume:
            self._finish_epoch(trained=False)

    def train_epoch(self, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Train to the end of the epoch in progress, measure, save; returns the epoch's metrics line.

        Raises:
            Interrupted: a signal came; the step is finished and saved.
            DivergenceError: NaN or infinity; result.json says so and the last checkpoint stays.
        """
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = self.lr, self.weight_decay
        order = data_order(len(self.dataset.train), self.recipe.seed, self.epoch + 1).to(self.device)
        with self._own_randomness(), peak_memory(self.device, self.rule, self.optimizer) as peak:
            self.rule.train()
            self._began = time.perf_counter()
            while self.step < self.steps_per_epoch:
                self._train_step(*self._batch(order, self.step))
                self.step += 1
                if on_step is not None:
                    on_step(self.step)
                self._between_steps()
            self._count_time()
            if self.peak_memory_mb is None and self.device.type == "cpu":
                with autocast(self.device, self.recipe.amp):
                    self.peak_memory_mb = step_megabytes(self.rule, self.optimizer, *self._batch(order, 0))
        if peak.megabytes is not None:
            self.peak_memory_mb = max(self.peak_memory_mb or 0.0, peak.megabytes)
        self._finish_epoch(trained=True)
        if self._signum and self.epoch < self.recipe.epochs:
            raise Interrupted(self._signum, f"the end of epoch {self.epoch}")
        return self.line

    def result(self, status: str = "finished", message: str | None = None) -> dict[str, Any]:
        """What result.json says; `ratio_to_bp` is filled in by a comparison."""
        steps = [line["ms_per_step"] for line in self.folder.read_metrics() if line["ms_per_step"] is not None]
        result = {
            "rule": self.recipe.rule,
            "seed": self.recipe.seed,
            "epochs": self.epoch,
            "test_accuracy": self.line.get("test_accuracy"),
            "validation_accuracy": self.line.get("validation_accuracy"),
            "train_loss": self.line.get("train_loss"),
            "ms_per_step": statistics.median(steps) if steps else None,
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
        return result if message is None else {**result, "message": message}

    def _batch(self, order: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """This process's share of batch number `step`: inputs (n, C, H, W) and targets (n,)."""
        size = self.recipe.batch_size
        chosen = order[step * size : (step + 1) * size]
        inputs, targets = self.dataset.train.inputs[chosen], self.dataset.train.targets[chosen]
        if self.augment is not None:  # of the whole batch, so that the number of processes does not matter
            draw = generator(self.device, self.recipe.seed, "augment", self.epoch + 1, step)
            inputs = self.augment(inputs, draw)
        return self.world.own_slice(inputs), self.world.own_slice(targets)

    def _train_step(self, inputs: Tensor, targets: Tensor) -> None:
        self._timer.start()
        self.optimizer.zero_grad()
        with autocast(self.device, self.recipe.amp):
            credit = self.module(inputs, targets)
        credit.backward()
        self.optimizer.step()
        self._timer.stop()
        with torch.no_grad():
            self._loss += credit.loss.double() * len(targets)
            self._hits += (credit.output.argmax(-1) == targets).sum()
        self._examples += self.world.size * len(targets)

    def _between_steps(self) -> None:
        """Look for NaN and signals; save where the recipe asks for it."""
        every, last = self.recipe.checkpoint_steps, self.step == self.steps_per_epoch
        save = bool(every) and self.step % every == 0 and not last
        cheap = self.device.type == "cpu" and self.world.size == 1
        if not (cheap or save or last or self.step % CHECK_EVERY == 0):
            return
        if not math.isfinite(self.world.sum(self._loss.clone()).item()):
            self._diverge("the training loss is not finite")
        self._signum = self.world.largest(self.stop.signum or 0)
        if (save or self._signum) and not last:
            self._check_parameters()
            self._count_time()
            self._save()
            if self._signum:
                raise Interrupted(self._signum, f"epoch {self.epoch + 1}, step {self.step}")

    def _finish_epoch(self, *, trained: bool) -> None:
        """Measure, check, save, append the line."""
        loss, hits = self.world.sum(torch.stack((self._loss, self._hits.double()))).tolist()
        with self._own_randomness():
            test_loss, test_accuracy = evaluate(self.rule, self.dataset.test, self.recipe.amp, self.world)
            held_out, validation_accuracy = self.dataset.validation, None
            if held_out is not None:
                _, validation_accuracy = evaluate(self.rule, held_out, self.recipe.amp, self.world)
            layers = alignment(self.rule, self.dataset.train, self.recipe.probe) if self.world.is_main else {}
        if not math.isfinite(test_loss):
            self._diverge("the test loss is not finite")
        self._check_parameters()
        self.line = {
            "epoch": self.epoch + trained,
            "train_loss": loss / self._examples if trained else None,
            "train_accuracy": hits / self._examples if trained else None,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "validation_accuracy": validation_accuracy,
            "ms_per_step": self._timer.median(),
            "seconds": self.seconds,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "layers": layers,
        }
        self.epoch, self.step = self.epoch + trained, 0
        self._clear_sums()
        self._save()
        if self.world.is_main:
            self.folder.append_metrics(self.line)

    def _clear_sums(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._hits = torch.zeros((), dtype=torch.int64, device=self.device)
        self._examples = 0
        self._timer.clear()

    def _count_time(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds, self._began = self.seconds + now - self._began, now

    def _check_parameters(self) -> None:
        for name, parameter in self.rule.named_parameters():
            if not torch.isfinite(parameter).all():
                self._diverge(f"parameter {name} is not finite")

    def _diverge(self, what: str) -> None:
        kept = f"the last good checkpoint (epoch {self.line['epoch']}) is kept" if self.line else "nothing was saved"
        message = (
            f"{self.recipe.rule} with seed {self.recipe.seed} diverged in epoch {self.epoch + 1}, step {self.step}, at "
            f"lr {self.lr:g}: {what}; {kept}. Try a smaller --lr"
        )
        if self.world.is_main and self.line:
            write_json(self.folder.result, self.result("diverged", message))
        raise DivergenceError(message)

    def _save(self) -> None:
        loss, hits = self.world.sum(self._loss.clone()), self.world.sum(self._hits.clone())
        if not self.world.is_main:
            return
        state = {
            "config": self.recipe.to_json(),
            "rule": dict(self.rule.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "rng": self._rng if self._rng is not None else checkpoint.rng_state(self.device),
            "epoch": self.epoch,
            "step": self.step,
            "partial": {
                "loss": loss,
                "hits": hits,
                "examples": self._examples,
                "times": self._timer.times(),
            },
            "seconds": self.seconds,
            "metrics": self.line,
            "peak_memory_mb": self.peak_memory_mb,
        }
        checkpoint.save(self.folder.checkpoint, state)

    def _restore(self, state: dict[str, Any]) -> None:
        path = self.folder.checkpoint
        unlike = differences(state["config"], self.recipe.to_json())
        if unlike:
            raise CheckpointError(f"checkpoint {path} has other options (saved vs asked): {'; '.join(unlike)}")
        if state["epoch"] + bool(state["step"]) > self.recipe.epochs:
            raise CheckpointError(f"checkpoint {path} is in epoch {state['epoch'] + bool(state['step'])}, past --epochs")
        field = "rule"
        try:
            self.rule.load_state_dict(state["rule"])
            field = "optimizer"
            self.optimizer.load_state_dict(state["optimizer"])
            field = "partial"
            partial = state["partial"]
            self._loss, self._hits = partial["loss"].to(self.device), partial["hits"].to(self.device)
            self._examples = partial["examples"]
            self._timer.restore(partial["times"])
            field = "rng"
            with self._own_randomness():
                checkpoint.set_rng_state(state["rng"], self.device)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = (str(error).strip().splitlines() or ["damaged"])[0]
            raise CheckpointError(f"checkpoint {path}: field {field!r} does not fit this run ({why})") from error
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.line, self.peak_memory_mb = state["metrics"], state["peak_memory_mb"]
        if not self.world.is_main:  # the saved sums are those of all processes
            self._loss.zero_()
            self._hits.zero_()

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Within, torch's global generators are this run's own, so that runs trained in turn do not mix."""
        others = checkpoint.rng_state(self.device)
        if self._rng is not None:
            checkpoint.set_rng_state(self._rng, self.device)
        self._rng = None
        try:
            yield
        finally:
            self._rng = checkpoint.rng_state(self.device)
            checkpoint.set_rng_state(others, self.device)
