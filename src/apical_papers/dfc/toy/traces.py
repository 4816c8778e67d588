"""Figure 1D of deep feedback control: the output driven to its target, and the three compartments of single neurons.

Student-teacher regression 15-10-10-1, tanh, with pre-trained feedback weights: k_p 1, alpha 0.0015, dt 0.005, 2000 points,
lambda 0.05 (the released script). In addition to the paper's weak nudge, the same sample, network and feedback are shown
under strong control (arXiv 2204.07249), whose target is the label itself.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from apical.bench.measure import probe_batch
from apical.bench.names import merged
from apical.core.losses import output_error
from apical.rules.feedback_control.deep_feedback_control import DeepFeedbackControl
from apical.rules.feedback_control.strong_deep_feedback_control import StrongDeepFeedbackControl
from apical.rules.feedback_control.trajectory import Trace
from apical_papers.dfc.toy.metrics import twin
from apical_papers.dfc.toy.runs import Plan, after_pretraining, begin, load, recipe

NUDGE, K_P, POINTS = 0.05, 1.0, 2000


@dataclass(frozen=True)
class Traces:
    """Trajectories of the probe samples.

    Attributes:
        weak, strong: compartments, control and output over time.
        weak_target, strong_target: targets of the output (batch, 1).
    """

    weak: Trace
    strong: Trace
    weak_target: Tensor
    strong_target: Tensor

    @property
    def typical(self) -> int:
        """Index of the sample whose output has the median distance from its label."""
        distance = (self.strong_target - self.strong.output[0]).norm(dim=1)
        return int(distance.argsort()[len(distance) // 2])


def record(plan: Plan, points: int = POINTS) -> Traces:
    """Pre-train the feedback weights on the task with one output, then record the probe samples over time."""
    dataset = load(plan, "student-teacher-1")
    settings = recipe("dfc", plan, plan.seeds[0])
    settings = replace(
        settings, data="student-teacher-1", epochs=1, rule_options=merged(settings.rule_options, (f"k_p={K_P}",))
    )
    records: list[Traces] = []
    with tempfile.TemporaryDirectory() as folder:
        training = begin(settings, dataset, Path(folder))
        rule = training.rule
        assert isinstance(rule, DeepFeedbackControl)
        samples = probe_batch(dataset.train, plan.probe)
        training.train_epoch(after_pretraining(training, lambda: records.append(follow(rule, *samples, points))))
    return records[0]


def follow(rule: DeepFeedbackControl, inputs: Tensor, targets: Tensor, points: int) -> Traces:
    """Record weak and strong control of the same samples through the same feedback weights."""
    weak = twin(rule, "dfc", "simulate", nudge=NUDGE, points=points)
    loop = weak.loop
    strong = StrongDeepFeedbackControl(
        *(rule.model, rule.loss, "simulate"),
        alpha=loop.alpha,
        k_p=loop.k_p,
        dt=loop.dt,
        points=points,
        tau=loop.tau,
        leak=loop.leak,
        sigma=0.0,
        learn="none",
    )
    strong.feedback = rule.feedback
    output = rule.run(inputs).r[-1]
    nudged = output - NUDGE * len(inputs) * output_error(rule.loss, output, targets)[1]
    return Traces(weak.trace(inputs, targets), strong.trace(inputs, targets), nudged, strong.goal(output, targets)[0])


def error_left(trace: Trace, target: Tensor) -> Tensor:
    """Return the distance of the last output from its target over that of the first: (batch,)."""
    left, first = (torch.linalg.vector_norm(target - trace.output[t], dim=1) for t in (-1, 0))
    share: Tensor = left / first
    return share


def still_moving(trace: Trace) -> Tensor:
    """Return the change of the control over the last tenth of the time, relative to its size: (batch,)."""
    before = trace.u[int(0.9 * (len(trace.u) - 1))]
    change: Tensor = (trace.u[-1] - before).norm(dim=1) / trace.u[-1].norm(dim=1)
    return change
