"""Papers: recipes, studies and tables, one folder each. Found by the entry-point group `apical.papers`."""
