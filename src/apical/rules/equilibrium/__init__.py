"""Equilibrium propagation: the rule, and the network that settles."""
