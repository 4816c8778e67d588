"""Options of the commands, one module per command; none of them imports torch."""
