"""Transformers and sequences."""
