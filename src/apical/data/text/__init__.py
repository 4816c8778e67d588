"""Sequences of tokens: texts, tasks that are generated, and what counting predicts of them."""
