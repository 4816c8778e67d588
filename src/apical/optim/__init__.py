"""Optimisers for rules with learned feedback."""

from apical.optim.input_adam import InputAdam as InputAdam
