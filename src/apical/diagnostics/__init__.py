"""Pure functions that measure what a rule does; they leave the rule, its gradients and random states untouched."""
