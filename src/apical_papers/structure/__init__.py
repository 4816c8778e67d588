"""Structure and depth: properties of weights and codes after training, and how far credit propagates."""
