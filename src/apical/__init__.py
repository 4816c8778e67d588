"""Train `nn.Module`s with credit-assignment rules other than backpropagation."""

from apical.core.credit import Credit, CreditRule

__all__ = ["Credit", "CreditRule"]
__version__ = "0.1.0"
