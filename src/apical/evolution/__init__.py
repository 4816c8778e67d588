"""Evolution of top-down networks: many learners' lifetimes at once, strategies, and workers that share them."""
