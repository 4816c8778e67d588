"""Top-down credit assignment: the rule and its teacher networks."""
