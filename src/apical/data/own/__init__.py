"""User data: files, folders, functions and Datasets in memory."""
