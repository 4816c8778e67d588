"""Product feedback alignment, Ji-An & Benna, "Deep Learning without Weight Symmetry" (arXiv 2405.20594): its studies.

Each study has one row per rule: the recipe and the numbers it should reproduce. Tags of the numbers: "fig" is read off
the published curves (seeds 0-4 for accuracies, seed 0 for angles), "paper" is printed in the text, "ours" was measured with
our prototype for settings that are not in the paper.
"""

from dataclasses import replace
from itertools import pairwise

from apical.bench.recipe import Recipe
from apical.bench.study import Claim, Published, Row, Study

XAVIER = ("scale='xavier'",)
"""DFA's feedback to feature maps, with the size used to measure our numbers."""


def _accuracies(
    epochs: tuple[int, ...], values: tuple[float, ...], tolerance: float, tag: str, split: str = "test"
) -> tuple[Published, ...]:
    return tuple(
        Published("accuracy", epoch, value, tolerance, tag, split=split) for epoch, value in zip(epochs, values, strict=True)
    )


def _angles(epoch: int, values: tuple[float, ...], tolerances: tuple[float, ...], tag: str) -> tuple[Published, ...]:
    return tuple(
        Published("angle", epoch, value, tolerance, tag, layer=layer)
        for layer, (value, tolerance) in enumerate(zip(values, tolerances, strict=True), start=1)
    )


def _mnist() -> Study:
    base = Recipe(
        data="mnist",
        model="mlp-512-512",
        epochs=40,
        batch_size=64,
        lr=(0.01, 0.005, 0.0025),
        lr_epochs=(20, 30),
        weight_decay=(1e-4,),
        probe=1000,
    )
    aligning = replace(base, weight_decay=(0.03, 9e-5), weight_decay_epochs=(1,))
    after = (1, 2, 3, 5, 10, 20, 30, 40)
    curves = {
        "bp": (96.75, 97.30, 97.73, 97.98, 98.30, 98.34, 98.37, 98.38),
        "fa": (92.72, 93.86, 94.03, 95.99, 96.84, 97.42, 98.17, 98.23),
        "dfa": (91.72, 94.35, 94.37, 95.58, 96.89, 97.44, 98.12, 98.15),
        "usf": (95.93, 97.18, 97.46, 97.86, 98.10, 98.21, 98.25, 98.25),
        "pfa": (93.22, 96.40, 97.23, 97.77, 98.10, 98.40, 98.40, 98.39),
        "pfa-o": (93.43, 96.74, 97.34, 97.86, 98.23, 98.40, 98.41, 98.42),
    }
    tight = (1.5, 1.5, 6.0)
    angles = {
        "pfa": _angles(1, (31.8, 30.7, 23.2), tight, "fig")
        + _angles(2, (23.2, 24.4, 23.5), tight, "fig")
        + _angles(5, (20.3, 21.7, 23.8), tight, "fig")
        + _angles(40, (19.0, 19.5, 23.3), tight, "fig"),
        "pfa-o": _angles(1, (34.7, 33.1, 6.6), tight, "fig")
        + _angles(2, (20.5, 22.2, 4.3), tight, "fig")
        + _angles(5, (13.9, 16.9, 3.4), tight, "fig")
        + _angles(40, (9.8, 11.6, 2.3), tight, "fig"),
        "usf": _angles(5, (31.0, 30.5, 29.7), tight, "fig"),
        "fa": _angles(5, (89.9, 87.0, 70.8), (1.5, 3.0, 6.0), "fig"),
    }
    slack = {"fa": 1.5, "dfa": 1.5}
    rows = {
        rule: Row(
            replace(aligning if rule.startswith("pfa") else base, rule=rule),
            _accuracies(after, curve, slack.get(rule, 0.5), "fig") + angles.get(rule, ()),
        )
        for rule, curve in curves.items()
    }
    kolen_pollack = _accuracies((1, 2, 3, 5), (91.54, 96.71, 97.35, 97.71), 0.5, "ours")
    rows["kp"] = Row(replace(aligning, rule="kp"), kolen_pollack + _angles(5, (14.0, 16.8, 3.4), tight, "ours"))
    claims = tuple(
        Claim(rule, other, epoch, 0.0) for epoch in (5, 40) for rule in ("bp", "usf", "pfa") for other in ("fa", "dfa")
    )
    claims += (Claim("pfa", "bp", 5, -0.5), Claim("pfa-o", "bp", 5, -0.5), Claim("pfa", "bp", 40, -0.15))
    return Study("PFA on MNIST, 784-512-512-10, 40 epochs", "about 4 minutes on one CPU core", rows, base, claims)


def _cifar10() -> Study:
    base = Recipe(
        data="cifar-10",
        model="resnet20",
        epochs=250,
        batch_size=128,
        lr=(0.1, 0.01, 0.001, 0.0001),
        lr_epochs=(100, 150, 200),
        weight_decay=(1e-4,),
        flip=True,
        crop=4,
        validation=5000,
    )
    aligning = replace(base, weight_decay=(0.005, 1e-4), weight_decay_epochs=(1,))
    slow = replace(base, lr=(1e-3, 1e-4, 1e-5, 1e-6))
    after = (1, 5, 20, 100, 110, 250)
    curves = {
        "bp": (base, (46.0, 71.9, 81.7, 84.7, 91.06, 91.42), 0.6),
        "fa": (base, (19.7, 31.8, 47.4, 54.2, 66.39, 64.70), 5.0),
        "dfa": (slow, (13.9, 18.9, 23.9, 30.6, 30.75, 30.67), 25.0),  # depends on how DFA treats convolutions
        "usf": (base, (40.1, 61.5, 78.3, 83.1, 89.88, 89.97), 0.7),
        "pfa": (aligning, (31.1, 69.2, 79.7, 84.4, 90.66, 90.70), 1.0),
        "pfa-o": (aligning, (29.3, 68.0, 82.5, 86.7, 91.15, 91.31), 0.6),
    }
    mean_angle = {"fa": 78.1, "usf": 38.4, "pfa": 17.1, "pfa-o": 0.18}
    rows = {}
    for rule, (recipe, curve, tolerance) in curves.items():
        published = _accuracies(after[-1:], curve[-1:], tolerance, "fig", "validation")
        published += _accuracies(after[:-1], curve[:-1], max(tolerance, 10.0), "fig", "validation")
        if rule in mean_angle:
            published += (Published("angle", 200, mean_angle[rule], 3.0, "fig", layer=0),)
        rows[rule] = Row(replace(recipe, rule=rule, rule_options=XAVIER if rule == "dfa" else ()), published)
    rows["kp"] = Row(replace(aligning, rule="kp"))
    order = ("bp", "pfa-o", "pfa", "usf", "fa", "dfa")
    claims = tuple(Claim(first, second, 250, 0.0, "validation") for first, second in pairwise(order))
    title, cost = "PFA on CIFAR-10, ResNet-20, 250 epochs", "about 15 hours on one CPU core: use a GPU"
    return Study(title, cost, rows, base, claims)


def _cifar10_small() -> Study:
    base = Recipe(
        data="cifar-10",
        model="resnet8",
        epochs=8,
        batch_size=64,
        lr=(0.05, 0.005),
        lr_epochs=(6,),
        weight_decay=(1e-4,),
        flip=True,
        train_limit=10_000,
        test_limit=4_000,
    )
    aligning = replace(base, weight_decay=(0.011, 1e-4), weight_decay_epochs=(2,))
    after = (1, 2, 4, 6, 8)
    curves = {
        "bp": (base, (33.0, 42.5, 55.6, 59.2, 65.9)),
        "pfa-o": (aligning, (18.6, 34.1, 41.7, 49.6, 62.3)),
        "pfa": (aligning, (17.1, 29.2, 37.7, 49.8, 61.6)),
        "usf": (base, (33.8, 41.7, 49.1, 51.7, 60.0)),
        "fa": (base, (25.9, 33.7, 35.1, 37.8, 46.6)),
    }
    mean_angle = {"pfa-o": (12.2, 3.0), "pfa": (20.2, 3.0), "usf": (33.2, 3.0), "fa": (84.2, 5.0)}
    rows = {}
    for rule, (recipe, curve) in curves.items():
        published = _accuracies(after[-1:], curve[-1:], 4.0, "ours") + _accuracies(after[:-1], curve[:-1], 10.0, "ours")
        if rule in mean_angle:
            published += (Published("angle", 8, *mean_angle[rule], "ours", layer=0),)
        rows[rule] = Row(replace(recipe, rule=rule), published)
    rows["kp"] = Row(replace(aligning, rule="kp"))
    rows["dfa"] = Row(replace(base, rule="dfa", lr=(1e-3, 1e-4), rule_options=XAVIER))
    title = "PFA on CIFAR-10 in small: ResNet-8, 10,000 images, 8 epochs (our setting, not the paper's)"
    claims = tuple(Claim(first, second, 8, 0.0) for first, second in pairwise(("bp", "pfa-o", "pfa", "usf")))
    claims += (Claim("pfa", "bp", 8, -8.0), Claim("pfa", "fa", 8, 8.0))
    return Study(title, "about 2 minutes on one CPU core", rows, base, claims)


STUDIES: dict[str, Study] = {"pfa-mnist": _mnist(), "pfa-cifar10": _cifar10(), "pfa-cifar10-small": _cifar10_small()}
