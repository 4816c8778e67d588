"""Evolution of top-down networks: many learners' lifetimes at once, evolution strategies, and workers to share them among."""
