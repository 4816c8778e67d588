"""Options of the commands, as dataclasses."""
