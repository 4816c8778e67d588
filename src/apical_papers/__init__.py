"""Papers: recipes, studies and tables, one folder each. Registered under the entry-point group `apical.papers`."""
