"""Sequences of tokens: texts, generated tasks, and count-based baselines."""
