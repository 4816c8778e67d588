"""Every rule of the library with its tuned learning rate: one table, equal budget."""
