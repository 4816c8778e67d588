"""Evolution of top-down networks: batched lifetimes of learners, evolution strategies, and workers to evaluate them."""
