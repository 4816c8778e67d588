"""Tools around the library: recipes, training loops, run folders, comparisons, figures and reports."""
