"""Corinfomax."""
