"""Counter-current learning: the rule, its blocks and its pair losses."""
