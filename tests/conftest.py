"""Hypothesis tries the same examples at every run; `--hypothesis-profile=default` draws new ones."""

from hypothesis import settings

settings.register_profile("fixed", max_examples=40, derandomize=True, deadline=None)
settings.load_profile("fixed")
