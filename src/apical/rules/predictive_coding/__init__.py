"""Predictive coding: the rule, its inference, and what is exact about it."""
