"""Predictive coding."""
