"""Muon for matrices and AdamW for the rest, as one optimiser: Muon (Jordan et al., 2024) takes matrices alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from apical.errors import ConfigError


class MuonAndAdamW(Optimizer):
    """Muon and AdamW, which go on being optimisers of PyTorch, each with groups of its own.

    Muon's step is scaled to the root mean square of AdamW's, so that one learning rate and decay suit both.

    Args:
        groups: as for any optimiser of PyTorch.
        is_matrix: whether a parameter is Muon's.
        betas: AdamW's; the first is also Muon's momentum.

    Raises:
        ConfigError: this PyTorch has no Muon.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        is_matrix: Callable[[Tensor], bool],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        muon: Any = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise ConfigError(
                f"optimizer muon needs torch.optim.Muon, which PyTorch {torch.__version__} does not have: update PyTorch, "
                "or use adamw"
            )
        matrices, others = [], []
        for group in groups:
            of_muon = {key: value for key, value in group.items() if key not in ("betas", "eps")}
            of_muon["momentum"] = group.get("betas", betas)[0]
            matrices.append({**of_muon, "params": [p for p in group["params"] if is_matrix(p)]})
            others.append({**group, "params": [p for p in group["params"] if not is_matrix(p)]})
        matrices, others = ([group for group in part if group["params"]] for part in (matrices, others))
        self.members: list[Optimizer] = []
        if matrices:
            self.members.append(muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.members.append(AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Groups of both."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """State of both, to be read."""
        return {parameter: its for member in self.members for parameter, its in member.state.items()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let both take a step."""
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for member in self.members:
            member.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Those of both."""
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of both."""
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
