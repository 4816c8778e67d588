"""Target propagation (arXiv 2006.14331): its studies.

Hyper-parameters are those of the released configurations, rounded to four digits; their learning rates are divided by eta,
and so are ours, through `normalised=False` and the rate itself. Their output error is that of the batch mean, so our eta is
theirs divided by 128. No readable source with the paper's tables was found: no row has a published number, and the claims
are the orders stated in the abstract and a review.

Departure: the extra pass after each epoch in which only feedback learns is the same as theirs, but within the epoch both
kinds of weights learn in the same steps in theirs and in separate passes in ours (`feedback_passes`).
"""

from dataclasses import replace
from typing import Any

from apical.bench.recipe import Recipe
from apical.bench.study import Claim, Row, Study, options_of, rows_of

BATCH = 128


def _scaled(lr: float, eta: float, sigma: float) -> dict[str, Any]:
    """Settings of a rule whose published learning rate and eta are those of its code."""
    options = options_of(eta=f"{eta / BATCH:.4g}", sigma=sigma, normalised=False, reduction="'mean'")
    return {"lr": (float(f"{lr / eta:.4g}"),), "rule_options": options}


def _digits() -> Study:
    """Return the specification's pilot: the 8 x 8 digits, four hidden layers of 64."""
    base = Recipe(
        data="digits",
        model="mlp-tanh-64-64-64-64",
        epochs=20,
        batch_size=64,
        optimizer="adam",
        lr=(1e-3,),
        weight_decay=(0.0,),
    )
    learned = replace(base, feedback_weight_decay=0.0, pretrain_epochs=5)
    options = {"rule_options": options_of(eta=0.05, sigma=0.05, reduction="'mean'")}
    rows = rows_of(base, ("bp", "dfa"))
    rows |= rows_of(learned, dict.fromkeys(("dtp", "dtp-drl", "ddtp-linear", "ddtp-control"), options))
    claims = (Claim("dtp-drl", "dtp", 20, -1.0), Claim("ddtp-linear", "dtp", 20, -1.0))
    return Study("Target propagation on digits, 64-4x64-10 tanh, 20 epochs", "seconds", rows, base, claims)


_MNIST = Recipe(
    data="mnist",
    model="mlp-tanh-256-256-256-256-256",
    epochs=100,
    batch_size=BATCH,
    optimizer="adam",
    weight_decay=(0.0,),
    validation=5000,
)

Adam = tuple[float, float, float, float]
"""Learning rate, decay rates of both moments, and epsilon."""


def _learned(rule: str, forward: Adam, eta: float, feedback: Adam, sigma: float, decay: float) -> Row:
    """Return a row with feedback that learns, in separate passes except for the first of these rules."""
    of_feedback: dict[str, Any] = dict(
        zip(("feedback_lr", "feedback_beta1", "feedback_beta2", "feedback_eps"), feedback, strict=True)
    )
    passes: dict[str, Any] = {} if rule == "dtp" else {"pretrain_epochs": 6, "feedback_passes": 2}
    own = _scaled(forward[0], eta, sigma)
    return Row(replace(_adam(rule, *forward), feedback_weight_decay=decay, **own, **of_feedback, **passes))


def _adam(rule: str, lr: float, beta1: float, beta2: float, eps: float) -> Recipe:
    return replace(_MNIST, rule=rule, lr=(lr,), momentum=beta1, beta2=beta2, eps=eps)


def _mnist() -> Study:
    tuned: dict[str, tuple[Adam, float, Adam, float, float]] = {
        "dtp": ((6.185e-5, 0.9, 0.999, 1.02e-8), 0.2195, (1.958e-3, 0.9, 0.999, 7.54e-6), 0.08372, 0.0),
        "dtp-drl": ((2.969e-5, 0.9, 0.99, 1.00e-8), 0.06859, (2.012e-5, 0.99, 0.999, 5.08e-8), 0.05688, 5.38e-6),
        "ddtp-linear": ((2.035e-5, 0.9, 0.999, 1.26e-8), 0.06097, (1.638e-4, 0.999, 0.999, 2.84e-4), 0.09075, 5.84e-7),
        "ddtp-control": ((8.883e-5, 0.9, 0.999, 5.55e-8), 0.09417, (1.871e-4, 0.9, 0.999, 1.23e-8), 0.00872, 4.02e-4),
    }
    """Adam of the forward weights, eta, Adam of the feedback, sigma, and the feedback's decay."""
    rows = {
        "bp": Row(_adam("bp", 2.970e-4, 0.99, 0.999, 6.93e-8)),
        "dfa": Row(_adam("dfa", 3.808e-4, 0.9, 0.999, 1.09e-7)),
        **{rule: _learned(rule, *numbers) for rule, numbers in tuned.items()},
    }
    orders = (("dtp-drl", "bp", -1.5), ("ddtp-linear", "bp", -1.5), ("dtp-drl", "dtp", -0.3))
    claims = tuple(Claim(rule, other, 10, least) for rule, other, least in orders)
    return Study("Target propagation on MNIST, 784-5x256-10 tanh", "minutes per epoch", rows, _MNIST, claims)


Tuned = dict[str, tuple[float, float, float, float]]
"""Rule -> learning rate, eta, learning rate of the feedback, sigma."""


def _tuned(
    title: str, base: Recipe, plain: dict[str, float], tuned: Tuned, *, pretrain: int, extra: int, neurons: int = 1024
) -> Study:
    """Return a study with only these four settings per rule: Adam has PyTorch's defaults, feedback does not decay."""
    rows = rows_of(base, {rule: {"lr": (lr,)} for rule, lr in plain.items()})
    for rule, (lr, eta, feedback_lr, sigma) in tuned.items():
        recipe = replace(base, rule=rule, feedback_lr=feedback_lr, feedback_weight_decay=0.0, **_scaled(lr, eta, sigma))
        if rule == "ddtp-rhl":
            recipe = replace(recipe, rule_options=(*recipe.rule_options, *options_of(neurons=neurons)))
        if rule != "dtp":
            recipe = replace(recipe, pretrain_epochs=pretrain, feedback_passes=1 + extra)
        rows[rule] = Row(recipe)
    claims = (Claim("dtp-drl", "dtp", 10, -0.3),)
    return Study(title, "minutes per epoch", rows, base, claims)


def _fashion() -> Study:
    tuned = {
        "dtp": (6.265e-5, 0.2413, 3.660e-4, 0.2675),
        "dtp-drl": (7.102e-5, 0.08657, 9.698e-5, 0.08433),
        "ddtp-linear": (8.704e-6, 0.01725, 7.959e-4, 0.09857),
        "ddtp-rhl": (3.375e-5, 0.02615, 1.157e-5, 0.04388),
        "ddtp-control": (3.008e-5, 0.03235, 3.121e-5, 0.08487),
    }
    base, plain = replace(_MNIST, data="fashion-mnist-raw"), {"bp": 2.876e-4, "dfa": 9.403e-4}
    return _tuned("Target propagation on Fashion-MNIST, 784-5x256-10 tanh", base, plain, tuned, pretrain=6, extra=1)


def _cifar10() -> Study:
    """Return the study on CIFAR-10. Pixels are normalised by their own means, not to (-1, 1)."""
    tuned = {
        "dtp": (8.083e-6, 0.07273, 2.131e-3, 0.2408),
        "dtp-drl": (1.412e-5, 0.02621, 1.518e-4, 0.09923),
        "ddtp-linear": (5.854e-5, 0.06693, 4.781e-5, 0.006339),
        "ddtp-rhl": (2.259e-6, 0.01618, 9.098e-4, 0.02741),
        "ddtp-control": (2.832e-6, 0.01017, 3.625e-4, 0.2896),
    }
    base = replace(_MNIST, data="cifar-10", model="mlp-tanh-1024-1024-1024")
    title, plain = "Target propagation on CIFAR-10, 3072-3x1024-10 tanh", {"bp": 3.887e-4, "dfa": 3.814e-4}
    return _tuned(title, base, plain, tuned, pretrain=10, extra=2, neurons=2048)


STUDIES = {"tp-digits": _digits(), "tp-mnist": _mnist(), "tp-fashion": _fashion(), "tp-cifar10": _cifar10()}
