"""Recipes, the training loop, run folders and comparisons."""
