"""Optimisers that suit rules whose feedback learns."""

from apical.optim.input_adam import InputAdam as InputAdam
