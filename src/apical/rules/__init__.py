"""One file per rule, named after the method; no rule imports another."""
