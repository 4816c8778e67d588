"""Dual propagation."""
