"""Strong deep feedback control with noise: the single phase by slow loops, the expected feedback update. float64."""

from itertools import product

import dfc_reference as ref
import pytest
import torch
from strong_dfc_reference import (
    KINDS,
    LOOP,
    goals,
    gradients,
    high_passed_products,
    jacobian_at,
    made,
    noisy_trajectory,
    open_loop,
    set_feedback,
    single_phase,
    slope_at,
)
from test_dfc import batch, far

from apical import StrongDeepFeedbackControl

VARIANTS = {
    "plain": {},
    "paper-leak": {"leak": "paper"},
    "voltage": {"difference": "voltage"},
    "silent-output": {"sigma_output": 0.0},
    "loud-output": {"sigma_output": 0.4, "scaled": False},
    "weak-noise": {"sigma": 0.004},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [*KINDS, "conv"])
def test_single_phase_is_the_slow_loop_with_the_same_noise(kind: str, variant: str) -> None:
    options = {"sigma": 0.2, "label": 0.9, "tau_noise": 0.08, "tau_slow": 0.7, "learn": "noise"} | LOOP | VARIANTS[variant]
    if kind == "conv":
        model, net = ref.conv_net()
        (inputs, targets), kind = batch((2, 6, 6), 3, size=2), "classes"
        options |= {"input_shape": (2, 6, 6), "solver": "simulate", "learn_output": True}
        rule = StrongDeepFeedbackControl(model, **options)
    else:
        rule, net, inputs, targets = made(kind, solver="simulate", learn_output=True, **options)
    torch.manual_seed(7)
    ours = gradients(rule, inputs, targets)
    scaled = bool(options.get("scaled", True))
    points, feedback = single_phase(net, inputs, goals(targets, 3, 0.9), kind, rule, scaled, seed=7)
    forward = ref.gradients(net, points, 2 / len(points), str(options.get("difference", "rate")))
    assert far([gradient for name, gradient in ours.items() if name.startswith("model")], forward) < 1e-10
    assert far([ours[f"feedback.{i}"] for i in range(3)], feedback) < 1e-10


def test_learning_the_feedback_by_noise_or_not_leaves_the_forward_rule_alone() -> None:
    """The same draws move the network, whoever listens."""
    found = {}
    for learn in ("noise", "expected", "none"):
        rule, _, inputs, targets = made("classes", solver="simulate", learn=learn, **LOOP)
        torch.manual_seed(7)
        found[learn] = gradients(rule, inputs, targets)
    for name, gradient in found["none"].items():
        assert name.startswith("model")
        assert torch.equal(gradient, found["noise"][name])
        assert torch.equal(gradient, found["expected"][name])


@pytest.mark.parametrize("leak", ["code", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_expected_feedback_update(kind: str, leak: str) -> None:
    """`-c_i s_i (sigma / max(sigma, 0.01))^2 mean_b (H_b J_b)^T` at the controlled states."""
    options = LOOP | {"tau_noise": 0.08, "tau_slow": 0.7, "leak": leak, "label": 0.9, "learn_output": True}
    rule, net, inputs, targets = made(kind, sigma=0.2, sigma_output=0.005, **options)
    u = rule.hold(inputs, targets).u
    points = [ref.controlled(net, x, rule.q, each) for x, each in zip(inputs, u, strict=True)]
    pulled = [[slope_at(point, kind) @ block for block in jacobian_at(net, point)] for point in points]
    ours = gradients(rule, inputs, targets)
    for i, blocks in enumerate(zip(*pulled, strict=True)):
        strength = open_loop(rule.loop, 3 - i, 0.05 / 0.7) * (1 + 0.12 / 0.08) ** (2 - i) * (0.25 if i == 2 else 1)
        assert strength > 0
        torch.testing.assert_close(ours[f"feedback.{i}"], -strength * torch.stack(blocks).mean(0).T, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_update_averages_to_the_expected_one_where_no_control_is_needed(kind: str) -> None:
    """To first order in the loop gain, that is: Q is made small, else `Q <u u^T>` (a decay of Q) joins in.

    With a label far away the trajectory's own transient, of the size of the error squared and not of the noise, is nearly
    all that the rule sees, low-pass or not.
    """
    options = {"k_p": 0.01, "dt": 0.01, "points": 40, "tau": 0.02, "tau_noise": 0.04, "learn_output": True, "label": 0.9}
    copies, updates = 3000, {}
    for near, learn in product((True, False), ("expected", "noise")):
        rule, net, inputs, targets = made(kind, (4, 5, 5, 3), 1, solver="simulate", learn=learn, sigma=0.01, **options)
        set_feedback(rule, [0.05 * q for q in rule.q])
        if near:  # the last biases put the output where the goal is
            with torch.no_grad():
                goal = goals(targets, 3, 0.9)
                rule.model[-1].bias += ((goal.log() if kind == "classes" else goal) - rule.model(inputs))[0]
        rule.phase = "feedback"
        torch.manual_seed(0)
        updates[near, learn] = list(gradients(rule, inputs.expand(copies, 4), targets.repeat_interleave(copies, 0)).values())
    for expected, sampled in zip(updates[True, "expected"], updates[True, "noise"], strict=True):
        assert torch.cosine_similarity(expected.flatten(), sampled.flatten(), dim=0) > 0.95
        assert float((expected * sampled).sum() / expected.square().sum()) == pytest.approx(1, abs=0.2)
    history = noisy_trajectory(
        *(net, inputs[0], rule.q, goals(targets, 3, 0.9)[0], kind, rule.loop, [0.0] * 3, [[None] * 3] * 39)
    )
    for sampled, transient in zip(updates[False, "noise"], high_passed_products(history, 0.01 / 0.5), strict=True):
        assert torch.cosine_similarity(sampled.flatten(), transient.flatten(), dim=0) > 0.95
    assert max(map(far, *([[each] for each in updates[False, learn]] for learn in ("noise", "expected")))) > 1
