"""Data of a user: files, folders, functions and Datasets in memory."""
