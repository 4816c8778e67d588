"""Tdca."""
