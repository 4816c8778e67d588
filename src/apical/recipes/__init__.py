"""The rules' short names and the papers' settings."""
