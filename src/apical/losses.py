"""Losses that PyTorch does not have in this form."""

from apical.core.losses import squared_error, token_cross_entropy

__all__ = ["squared_error", "token_cross_entropy"]
