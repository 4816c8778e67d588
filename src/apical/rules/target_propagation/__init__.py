"""Difference target propagation."""
