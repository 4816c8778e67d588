"""Rules around rules: node importance, local solvers, and semi-implicit steps."""
