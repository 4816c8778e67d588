"""The evolution of teachers as a run in a folder."""
