"""The optimiser's steps for a rule with plastic feedback: which form is exact for each layer, before each step."""

from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from apical.core.stepping import (
    Arrival,
    Group,
    Signature,
    distributed,
    ignore,
    is_compiled,
    is_hooked,
    noted,
    observe,
    signature,
    skipped,
    unchanged,
)
from apical.core.units import key
from apical.errors import ConfigError
from apical.rules.plastic_feedback.decay import Decays, Rehearsal, clock, is_known, not_known
from apical.rules.plastic_feedback.held import fill, vacate
from apical.rules.plastic_feedback.mismatch import Mismatch, Watch
from apical.rules.plastic_feedback.sharing import FUNCTION, OPTIONS_DIFFER, PARTED, Sharing, parallel

if TYPE_CHECKING:
    from apical.rules.plastic_feedback.plastic_rule import PlasticRule

Places = dict[str, tuple[Group | None, Group | None]]
"""By layer: the optimiser's groups that contain the weight and the feedback."""

FROZEN = "its weight is frozen"
RESTS = "its feedback was frozen"
APART = "its weight and its feedback have different optimisers"
REPLACED = "its weight was replaced by another parameter"
OWN = 'update="own" gives it the optimiser\'s own moments'
MOVED = "its weight also moves between passes without an optimiser step, as in sharpness-aware minimisation"
HOOKED = "hooks run within the optimiser's step and may change gradients or weights"
UNENDED = "a step of the optimiser did not end, which may have moved weights without their feedback"
COMPILED = "the optimiser's step is compiled"
OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
NO_MATTER = {"params", "param_names", "name", "initial_lr", "foreach", "fused", "capturable", "max_lr", "min_lr"}


class Steps:
    """A rule's record of the optimiser that moves its weights: decides the form of every layer, and keeps it exact.

    Args:
        rule: the rule; it is not kept alive.
    """

    def __init__(self, rule: "PlasticRule") -> None:
        self._rule = ref(rule)
        self._known: WeakKeyDictionary[Optimizer, tuple[Signature, Places]] = WeakKeyDictionary()
        self._moving: dict[str, tuple[Group, bool, float | None]] = {}
        self._begun = 0
        self._decays = Decays()
        self._rehearsals: dict[str, Rehearsal] = {}
        self._rehearsed: WeakKeyDictionary[Optimizer, set[str]] = WeakKeyDictionary()
        self._lonely: dict[str, int] = {}
        self.resting: set[str] = set()  # layers in closed form whose R was frozen
        self._drifts: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._hooks: dict[str, Any] = {}
        self._arrivals: dict[str, Arrival] = {}
        self.sharing = Sharing(self._arrivals, self._decays)
        self._listens = rule.form in ("auto", "closed") or not (rule.ALIKE or rule.update == "own")
        self.forget()
        observe(self)

    def _listen(self) -> None:
        """Watch the gradients that weights receive, even if these are now other parameters."""
        for name, layer in self.rule.layers.items() if self._listens else ():
            weight, own = layer._parameters.get("weight"), self._arrivals.get(name)
            if weight is None or not (weight.requires_grad and weight.is_leaf):
                continue
            if own not in (weight._post_accumulate_grad_hooks or {}).values():  # a weak reference would forbid swap_tensors
                if name in self._hooks:
                    self._hooks[name].remove()
                self._arrivals[name] = Arrival()
                self._hooks[name] = weight.register_post_accumulate_grad_hook(self._arrivals[name])

    @property
    def rule(self) -> "PlasticRule":
        """The rule."""
        return cast("PlasticRule", self._rule())

    def remove(self) -> None:
        """Stop, and leave nothing on the weights."""
        ignore(self)
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def remember(self, name: str) -> None:
        """A state is about to be loaded; where it comes without the optimiser's, the feedback's momentum stays."""
        if name in self._watches and self.moving(name):
            watch = self._watches[name]
            self._drifts[name] = watch.mismatch.drift(), watch.momentum

    def forget(self) -> None:
        """A state was loaded: discard all knowledge of weights and optimiser."""
        self._watches: dict[str, Watch] = {}
        self._moving.clear()
        self._rehearsals.clear()
        self._known.clear()
        self._passes: dict[str, int] = {}
        self.sharing.forget()
        self._listen()

    def concerns(self, optimizer: Optimizer) -> bool:
        """Whether it holds a weight or an R of the rule; not for a rule whose construction has not ended."""
        entry, rule = self._known.get(optimizer), self._rule()
        if entry is None or not unchanged(optimizer, entry[0]):
            if rule is None or not rule.is_built():
                return False
            entry = self._known[optimizer] = (signature(optimizer), self._places(optimizer))
        return bool(entry[1])

    def _places(self, optimizer: Optimizer) -> Places:
        rule, places = self.rule, {}
        held = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for name, layer in rule.layers.items():
            weight = layer._parameters.get("weight")
            plastic = None if rule.form == "closed" else rule.plastic_of(name)
            groups = held.get(id(weight)), held.get(id(plastic))
            if groups != (None, None):
                places[name] = groups
            if plastic is not None and weight is not None:
                setattr(plastic, "outputs", rule.outputs(name))  # noqa: B010  of the layer, whatever the rows of R
        return places

    def require(self, name: str) -> None:
        """Refuse a closed form whose weight moves without an announced step; leave the closed form for a new parameter."""
        if name in self._watches and self._watches[name].parameter is not self.rule.layers[name].weight:
            self.open(name, REPLACED)
            self._known.clear()
            return
        if self.resting and name in self.resting:
            self.open(name, RESTS)
            return
        if name in self._watches and self._watches[name].is_elsewhere():  # where torch.utils.swap_tensors takes no hooks
            weight = self.rule.layers[name].weight
            weight._post_accumulate_grad_hooks = weight._post_accumulate_grad_hooks
        arrival = self._arrivals.get(name)
        if self.moved(name) or (arrival is not None and arrival.moves > 3):
            raise ConfigError(
                f"the weight of layer {name!r} moves without the steps of a torch.optim.Optimizer (by hand, or as in "
                f"sharpness-aware minimisation), which {type(self.rule).__name__} in closed form cannot follow: build the "
                'rule with form="explicit"'
            )

    def moved(self, name: str) -> bool:
        """Whether a weight, whose gradient has arrived, has moved since the first pass after the last step."""
        weight, arrival = self.rule.layers[name]._parameters.get("weight"), self._arrivals.get(name)
        if weight is None or arrival is None:
            return False
        if not arrival.fresh:
            self._passes[name] = weight._version
        return self._passes.setdefault(name, weight._version) != weight._version or not arrival.rests(weight)

    def is_sampled(self) -> bool:
        """Whether some weight's gradient must be checked for other contributions in the next pass."""
        return any(arrival.sampled for arrival in self._arrivals.values())

    def taps(self) -> dict[str, Tensor]:
        """Weights of closed layers, checked at first and periodically, to separate the rule's gradient from others."""
        taps = {}
        for name, arrival in self._arrivals.items() if torch.is_grad_enabled() and not torch.compiler.is_compiling() else ():
            closed = self.rule.mismatch_of(name) is not None
            if arrival.sampled and closed and name in self._watches:
                taps[self.rule.weight_name(name)] = noted(self._watches[name].parameter, arrival)
            elif not closed and self.sharing.spares(name) and self.sharing.is_due(name):
                taps[self.rule.weight_name(name)] = noted(self.rule.layers[name].weight, arrival)
        return taps

    def moving(self, name: str) -> bool:
        """Whether a layer in closed form has a velocity."""
        mismatch = cast(Mismatch, self.rule.mismatch_of(name))
        return mismatch.v[0] != 0 or mismatch.velocity is not None

    def before_step(self, optimizer: Optimizer) -> None:
        """Decide the form of each layer; refuse, or go back to the explicit one, where the closed one would not be exact."""
        rule, places = self.rule, self._known[optimizer][1]
        for name in [*self._moving] if self._begun == id(optimizer) else ():  # its last step has not been followed
            if rule.mismatch_of(name) is not None:
                self.open(name, UNENDED, optimizer)
        self._moving.clear()
        self._begun = id(optimizer)
        self.sharing.begin()
        self._decays.begin()
        around = HOOKED if is_hooked(optimizer) else COMPILED if is_compiled() else None
        for name, (group, other) in places.items():
            if rule.mismatch_of(name) is not None:
                self._keep_closed(name, optimizer, group, other, around)
            else:
                self._restore_what_was_lost(name)
                self._count_steps_alone(name, group, other)
                if rule.form == "auto" and name not in rule.reasons:
                    self._decide(name, optimizer, group, other, around)
            if other is not None and rule.mismatch_of(name) is None:
                if is_sgd(optimizer):
                    self.sharing.restore(rule, name)
                else:
                    is_alike = group is not None and alike(group, other, optimizer)
                    self.sharing.before_step(rule, name, optimizer, group, other, is_alike)
        for name in places:  # other layers may have their own optimiser
            arrival, watch = self._arrivals.get(name), self._watches.get(name)
            if arrival is not None:
                if watch is not None:
                    arrival.sampled, arrival.fresh = watch.steps < 3 or watch.steps % 16 == 15, False
                arrival.stepped()
        rule._called -= places.keys()

    def after_step(self, optimizer: Optimizer) -> None:
        """Advance the mismatches, and each R that takes the weights' change, by the last step."""
        for name, rehearsal in self._rehearsals.items() if not skipped(optimizer) else ():
            if rehearsal.holds():
                self._rehearsed.setdefault(optimizer, set()).add(name)
            else:
                self.rule.reasons[name] = not_known(optimizer)
        self._rehearsals.clear()
        if (self._moving or self.sharing) and not skipped(optimizer):
            if any(k is not None for _, _, k in self._moving.values()):
                self.rule.moved_by = type(optimizer).__name__
            for name, (group, first, k) in self._moving.items():
                watch = self._watches[name]
                if k is None:
                    watch.mismatch.advance(group, first)
                else:
                    watch.mismatch.shrink(k)
                watch.stepped()
                watch.note(optimizer, momentum_of(optimizer, watch.parameter))
            self.sharing.after_step(self.rule, optimizer)
        elif self._moving:  # a fused step counts as a change although it was skipped
            for name in self._moving:
                self._watches[name].note(optimizer, momentum_of(optimizer, self._watches[name].parameter))
        self._moving.clear()
        self._passes.clear()
        self.sharing.begin()

    def hear(self) -> None:
        """A forward pass begins, in which every explicit R has its own gradient."""
        self.sharing.hear()
        for arrival in self._arrivals.values():
            arrival.waits = False

    def _restore_what_was_lost(self, name: str) -> None:
        """Compute R's gradient from the weight's, if a backward pass began in closed form and ended in the explicit one.

        Raises:
            ConfigError: the weight's gradient is not only this rule's.
        """
        arrival = self._arrivals.get(name)
        if arrival is None or not arrival.lost:
            return
        rule, plastic, weight = self.rule, self.rule.plastic_of(name), self.rule.layers[name].weight
        expected = None if weight.grad is None else rule.from_weight(name, weight.grad)
        if expected is None or (plastic.grad is not None and _equal(plastic.grad, expected)):
            return
        if plastic.grad is not None or arrival.foreign or not arrival.untouched(cast(Tensor, weight.grad)):
            raise ConfigError(
                f"the feedback of layer {name!r} was read or written between a forward pass and its backward pass, where "
                f"{type(rule).__name__} in closed form has no gradient for it: do so before the rule is called or after "
                'backward(), or build the rule with form="explicit"'
            )
        plastic.grad = expected

    def _count_steps_alone(self, name: str, group: Group | None, other: Group | None) -> None:
        plastic, weight = self.rule.plastic_of(name), self.rule.layers[name].weight
        if other is not None or not plastic.requires_grad:
            self._lonely[name] = 0
        elif group is not None and weight.grad is not None and name in self.rule._called:
            self._lonely[name] = self._lonely.get(name, 0) + 1
            if self._lonely[name] >= 3:  # R may have its own optimiser, which steps after this one
                raise ConfigError(
                    f"the optimiser updates the weight of layer {name!r} but not {type(self.rule).__name__}'s feedback for "
                    "it: pass the optimiser rule.parameters(), not model.parameters()"
                )

    def _decide(self, name: str, optimizer: Optimizer, group: Group | None, other: Group | None, around: str | None) -> None:
        rule, plastic = self.rule, self.rule.plastic_of(name)
        weight = rule.layers[name].weight
        if plastic.grad is None and plastic.requires_grad and (weight.grad is None or name not in rule._called):
            return  # nothing of this layer moves in this step, or not by this rule
        reason = around or self._obstacle(name, optimizer, group, other)
        if reason is not None:
            rule.reasons[name] = reason
            return
        k = self._k(name, optimizer, cast(Group, group))
        if k is not None and rule.ALIKE and not is_known(optimizer) and name not in self._rehearsed.get(optimizer, ()):
            self._rehearsals[name] = Rehearsal(weight, plastic, k)
            return
        held = rule.to_weight(name, plastic.detach())
        mine, its = (momentum_of(optimizer, p) for p in (weight, plastic))
        velocity = None if mine is None or its is None else rule.to_weight(name, its).sub_(mine)
        rule.close(name, Mismatch(held.sub_(weight.detach()), velocity), weight.detach())
        vacate(plastic, rule, name)
        optimizer.state.pop(plastic, None)
        self._move(name, cast(Group, group), k, momentum_of(optimizer, weight))

    def _k(self, name: str, optimizer: Optimizer, group: Group) -> float | None:
        """The factor by which this step shrinks the weight; None under `torch.optim.SGD`, which has its own recursion."""
        k = None if is_sgd(optimizer) else self._decays.factor(optimizer, group, self.rule.layers[name].weight)
        assert not isinstance(k, str)
        return k

    def _refused(self, name: str, optimizer: Optimizer, group: Group | None) -> str | None:
        """Why no closed form follows this optimiser; None where one does."""
        if is_sgd(optimizer):
            return "the optimiser is differentiable" if (group or {}).get("differentiable") else None
        if self.rule.update == "own":
            return OWN
        k = 0.0 if group is None else self._decays.factor(optimizer, group, self.rule.layers[name].weight)
        return k if isinstance(k, str) else None

    def _obstacle(self, name: str, optimizer: Optimizer, group: Group | None, other: Group | None) -> str | None:
        """Why the layer cannot take the closed form in this step; None where it can."""
        rule, plastic = self.rule, self.rule.plastic_of(name)
        weight, arrival = rule.layers[name].weight, self._arrivals.get(name)
        if not rule.is_plain(name):
            return FUNCTION
        if not weight.requires_grad or arrival is None:
            return FROZEN
        if distributed():
            return "several processes share their gradients"
        reason = self._refused(name, optimizer, group)
        if reason is not None:
            return reason
        if group is None or other is None:
            return APART
        if not alike(group, other, optimizer):
            return OPTIONS_DIFFER
        if weight.grad is None or plastic.grad is None or weight.grad.is_sparse:
            return "its weight or its feedback has no separate dense gradient"
        mine, its = (optimizer.state.get(p, {}) for p in (weight, plastic))
        if rule.ALIKE and not is_sgd(optimizer) and (bool(mine) != bool(its) or clock(mine) != clock(its)):
            return "its weight and its feedback have different states in the optimiser"
        if not is_sgd(optimizer):  # R takes W's change, whatever was done to the size of gradients
            return None if parallel(plastic.grad, rule.from_weight(name, weight.grad)) else PARTED
        if not arrival.untouched(weight.grad) or _hooked(weight):
            return "gradients were changed between the backward pass and the step (by clipping, for example)"
        if not _equal(plastic.grad, rule.from_weight(name, weight.grad)):
            return "the gradient of its feedback is not that of its weight (a penalty on the weight, a tied weight, a clip)"
        mine, its = (momentum_of(optimizer, p) for p in (weight, plastic))
        if (mine is None) != (its is None):
            return "only one of its weight and its feedback has a momentum in the optimiser"
        return None

    def _keep_closed(
        self, name: str, optimizer: Optimizer, group: Group | None, other: Group | None, around: str | None
    ) -> None:
        rule = self.rule
        weight = rule.layers[name].weight
        arrival = self._arrivals.get(name)
        if group is None and name in rule._called and name in self._watches:  # it did move this weight, not another one
            return self.open(name, APART, optimizer)
        if group is None or (weight.grad is None and not (arrival is not None and arrival.fresh)):
            return None
        reason = self._refused(name, optimizer, group)
        if reason is not None:
            return self.open(name, reason, optimizer)
        if around is not None:
            return self.open(name, around, optimizer)
        if other is not None and not alike(group, other, optimizer):
            return self.open(name, OPTIONS_DIFFER, optimizer)
        watch, momentum = self._watches.get(name), momentum_of(optimizer, weight)
        self._require_untouched(name, watch, optimizer, momentum)
        if arrival is not None and arrival.fresh and name not in rule._called:
            self.open(name, "its weight also learns from gradients that are not this rule's", optimizer)
            rule.plastic_of(name).grad = None
            return None
        if arrival is not None and arrival.foreign:
            raise ConfigError(
                f"the weight of layer {name!r} also receives gradients that are not {type(rule).__name__}'s (a penalty, "
                "another loss, a hook), which cannot be separated from its feedback in closed form: build the rule with "
                'form="explicit"'
            )
        if not is_sgd(optimizer) and weight.requires_grad and weight.grad is not None:
            if not rule.clips and arrival is not None and not arrival.untouched(weight.grad):
                rule.clips = True
            return self._move(name, group, self._k(name, optimizer, group), momentum)
        if arrival is None or weight.grad is None or not arrival.untouched(weight.grad) or not weight.requires_grad:
            raise ConfigError(
                f"the gradient of layer {name!r} was changed between the backward pass and the step (by clipping, for "
                f"example), which {type(rule).__name__} in closed form cannot apply to the feedback: build the rule with "
                'form="explicit"'
            )
        before = None if watch is None else watch.optimizer
        if before is not None and before() is not optimizer and momentum is not None:
            raise ConfigError(
                f"two optimisers alternate on the weight of layer {name!r}, each with its own momentum: build the "
                f'{type(rule).__name__} with form="explicit"'
            )
        return self._move(name, group, None, momentum)

    def _require_untouched(self, name: str, watch: Watch | None, optimizer: Optimizer, momentum: Tensor | None) -> None:
        """Refuse outside changes of R or its momentum, neither of which the closed form stores."""
        if watch is None or watch.momentum is None:
            return
        now = momentum if watch.parameter is self.rule.layers[name].weight else momentum_of(optimizer, watch.parameter)
        if not watch.is_kept(now) and self.moving(name):
            what = "changed" if now is watch.momentum else "replaced"
            raise ConfigError(
                f"the optimiser's momentum of layer {name!r} was {what}, but that of its feedback is part of "
                f'{type(self.rule).__name__}\'s own state: load both states, or build the rule with form="explicit"'
            )

    def _move(self, name: str, group: Group, k: float | None, now: Tensor | None) -> None:
        """The next step moves this weight, by SGD or with a separate decay of k."""
        weight = cast(nn.Parameter, self.rule.layers[name].weight)
        watch = self._watches.get(name)
        mismatch = cast(Mismatch, self.rule.mismatch_of(name))
        if watch is None or watch.parameter is not weight or watch.mismatch is not mismatch:
            watch = self._watches[name] = Watch(weight, mismatch)
            drift, momentum = self._drifts.pop(name, (None, None))
            if momentum is not None and momentum is now:
                mismatch.restart(watch.weight, drift)
        if watch.moved():
            mismatch.measure(watch.weight)
            self._arrivals[name].is_wary = True
        self._moving[name] = (group, now is None, k)

    def open(self, name: str, reason: str, optimizer: Optimizer | None = None) -> None:
        """Return to the explicit form: R = B^T F, with the gradient and the momentum that it would now have.

        The part of R that B ignores is zero from here on.

        Raises:
            ConfigError: form="closed" was requested.
        """
        rule = self.rule
        if rule.form == "closed":
            raise ConfigError(
                f"{type(rule).__name__} in closed form cannot train layer {name!r}: {reason}; build the rule with "
                'form="explicit", or "auto"'
            )
        mismatch, watch = cast(Mismatch, rule.mismatch_of(name)), self._watches.pop(name, None)
        weight = rule.layers[name].weight if watch is None else watch.parameter
        optimizer = optimizer or (None if watch is None or watch.optimizer is None else watch.optimizer())
        inference = torch.inference_mode(False)
        with inference, torch.no_grad(), torch.autocast(weight.device.type, enabled=False):  # whatever the caller's context
            self._explicit(name, mismatch, weight, optimizer)
        del rule._mismatches()[key(name)]
        rule.unsettle(name)
        self.resting.discard(name)
        rule.reasons[name] = reason + rule.forgets(name)
        if name in self._arrivals:
            self._arrivals[name].waits = name in rule._called  # for a backward pass that was not asked for R's gradient

    def _explicit(self, name: str, mismatch: Mismatch, weight: Tensor, optimizer: Optimizer | None) -> None:
        rule, plastic = self.rule, self.rule.plastic_of(name)
        fill(plastic, rule.from_weight(name, mismatch.feedback))
        held = cast(Tensor, rule.layers[name]._parameters.get("weight", weight))
        if held.grad is not None and any(own is held for own in rule.layers[name].parameters()):  # not a former one's
            plastic.grad = rule.from_weight(name, held.grad)
        holders = [each for each, (_, places) in self._known.items() if places.get(name, (None, None))[1] is not None]
        for holder in holders or ([] if optimizer is None else [optimizer]):
            if (buffer := momentum_of(holder, weight)) is not None:
                holder.state[plastic]["momentum_buffer"] = rule.from_weight(name, mismatch.drift().add_(buffer))
            elif not is_sgd(holder):
                holder.state[plastic].update(rule.own_state(holder.state.get(weight, {})))


def is_sgd(optimizer: Optimizer) -> bool:
    """Whether it is torch's own SGD, under which R needs only its gradient."""
    return type(optimizer) is SGD


def momentum_of(optimizer: Optimizer, weight: Tensor) -> Tensor | None:
    """SGD's momentum of a weight."""
    return optimizer.state.get(weight, {}).get("momentum_buffer") if is_sgd(optimizer) else None


def alike(group: Group, other: Group, optimizer: Optimizer) -> bool:
    """Whether the optimiser moves the parameters of both groups in the same way."""
    if group is other:
        return True
    options = OPTIONS if is_sgd(optimizer) else group.keys() - NO_MATTER
    return all(group.get(option) == other.get(option) for option in options)


def _hooked(weight: Tensor) -> bool:
    """Whether another hook may change the weight's gradient."""
    after = (weight._post_accumulate_grad_hooks or {}).values()
    return bool(weight._backward_hooks) or not all(isinstance(hook, Arrival) for hook in after)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding."""
    allowed = 1e3 * torch.finfo(expected.dtype).eps
    return actual.shape == expected.shape and bool((actual - expected).norm() <= allowed * expected.norm())
