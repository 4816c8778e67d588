"""What test_two_ranks.py runs on two ranks: trains every rule on half batches."""

import torch
from torch.nn.parallel import DistributedDataParallel

from apical import models
from apical.bench.names import RULES, make_rule
from apical.bench.recipe import Recipe
from apical.core.credit import CreditRule
from apical.errors import ConfigError
from apical.rules.plastic_feedback.plastic_rule import PlasticRule

STEPS, BATCH = 5, 16
TRAINED = [name for name, entry in RULES.items() if "teacher" not in entry.options]
"""Shipped teachers serve ten classes only; the rule with another teacher is among these."""
STIFF = ("strong-dfc",)
"""Rules that need float64 to be comparable: holding a label at 0.99 multiplies the rounding of the output by a thousand."""


NOISY = tuple(name for name in TRAINED if "dtp" in name)
"""Rules whose feedback learns from noise that every rank draws for itself: theirs stays as it is."""

ONE_SIDED = {"ep-one-sided": ("estimator='one-sided'",), "corinfomax": ("nudge='one-sided'", "forgetting=1.0")}
"""Rules that draw a sign for every batch, each rank its own, or whose lateral weights follow each rank's own half."""


def make(name: str) -> CreditRule:
    """In float64: rules that settle to a tolerance of float32 settle a little differently for other batches."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        options = ("learn=False",) if name in NOISY else ONE_SIDED.get(name, ())
        model = models.build("mlp-mu-12x2" if name == "mupc" else "mlp-16-12", (1, 4, 4), 5)
        return make_rule(Recipe(rule=name, rule_options=options), model, (1, 4, 4))
    finally:
        torch.set_default_dtype(torch.float32)


def train(rule: CreditRule, rank: int, size: int) -> dict[str, torch.Tensor]:
    """Rank `rank` of `size` takes every size-th sample of each batch; one process takes them all."""
    module = DistributedDataParallel(rule) if size > 1 else rule
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    torch.manual_seed(1)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(BATCH, 1, 4, 4, generator=generator, dtype=torch.float64)
        targets = torch.randint(0, 5, (BATCH,), generator=generator)
        inputs = inputs.to(next(rule.parameters()).dtype)
        for _ in range(rule.repeats):
            optimizer.zero_grad()
            module(inputs[rank::size], targets[rank::size]).backward()
            optimizer.step()
    state = rule.state_dict()
    if isinstance(rule, PlasticRule):  # explicit in two processes and closed in one: the same feedback, kept in another form
        state = {
            **rule.model.state_dict(),
            **{f"feedback of {key}": value for key, value in rule.feedback_weights().items()},
        }
    return {key: value.clone() for key, value in state.items()}


SHARDED = (
    *("bp", "fa", "usf", "kp", "pfa", "wm", "dfa", "ccl", "dtp", "dfc", "strong-dfc", "ep-one-sided", "corinfomax"),
    *("pc-incremental", "local-both", "dualprop", "sibp"),
)
"""One rule of each kind, which two ranks share parameters of."""


def train_model(rule: CreditRule, rank: int, size: int) -> dict[str, torch.Tensor]:
    """The model after two steps, of which a rank may hold a part."""
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(BATCH, 1, 4, 4, generator=generator, dtype=next(rule.parameters()).dtype)[rank::size]
        targets = torch.randint(0, 5, (BATCH,), generator=generator)[rank::size]
        for number in range(rule.repeats):
            optimizer.zero_grad()
            credit = rule(inputs, targets)
            (credit if (step + number) % 2 else credit.loss).backward()
            optimizer.step()
    parameters = {name: parameter.detach() for name, parameter in rule.model.named_parameters()}
    return {name: getattr(value, "full_tensor", value.clone)() for name, value in parameters.items()}


def train_sharded(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """What models have learned of which each rank holds a part, by `fully_shard(rule)`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    return {name: train_model(fully_shard(make(name), mesh=mesh), rank, 2) for name in SHARDED}


ADAPTIVE = ("kp", "pfa", "pfa-o")
"""Rules whose feedback takes the weights' change under AdamW."""

CONSTRAINED = ("csdp", "csdp-memristor")
"""Rules that put weights back within bounds after each step, and draw spikes."""


def train_further(rule: CreditRule, rank: int, size: int) -> dict[str, torch.Tensor]:
    """Model and feedback after three steps of AdamW, before the last of which the state is saved, loaded and looked at."""
    optimizer = torch.optim.AdamW(rule.parameters(), lr=0.01, weight_decay=0.1)
    dtype = next(rule.parameters()).dtype
    for step in range(3):
        inputs = torch.randn(BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(step), dtype=dtype)[rank::size]
        optimizer.zero_grad()
        rule(inputs, torch.arange(BATCH)[rank::size] % 5).backward()
        optimizer.step()
        rule.constrain_()
        if step == 1:
            rule.load_state_dict(rule.state_dict())
    state = {**dict(rule.model.named_parameters()), **{f"feedback of {k}": v for k, v in rule.feedback_weights().items()}}
    return {name: getattr(value, "full_tensor", value.clone)().detach() for name, value in state.items()}


def train_sharded_further(rank: int) -> tuple[dict[str, dict[str, torch.Tensor]], str]:
    """What such rules have learned by `fully_shard(rule)`, and why one has no table of placement."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rules = {name: fully_shard(make(name), mesh=init_device_mesh("cpu", (2,))) for name in (*ADAPTIVE, *CONSTRAINED)}
    learned = {name: train_further(rule, rank, 2) for name, rule in rules.items()}
    try:
        rules["pfa"].placement(torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    except ConfigError as error:
        return learned, str(error)
    return learned, ""


def train_all(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """What every rule has learned on this rank."""
    return {name: train(make(name), rank, 2) for name in TRAINED}
