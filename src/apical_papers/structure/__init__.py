"""Structure and depth: what weights and codes look like after training, and how far down credit arrives."""
