"""Matrices whose size grows with the square of a layer's outputs are refused before they exhaust the memory."""

import os

import torch
from torch import Tensor

from apical.errors import UnsupportedModelError


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that a device has, used or not; None if that is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def require_memory(what: str, n_bytes: int, like: Tensor, remedy: str) -> None:
    """Raise UnsupportedModelError if a device cannot hold a rule's matrices.

    Args:
        what: the matrices and their layer, for the message.
        n_bytes: their size, with what computing them takes.
        like: a tensor on the device.
        remedy: what the caller can do instead.
    """
    limit = device_memory(like.device)
    if limit is not None and n_bytes > limit:
        raise UnsupportedModelError(
            f"{what} need {n_bytes / 1e9:,.0f} GB, and {like.device.type} has {limit / 1e9:,.0f} GB: {remedy}"
        )
