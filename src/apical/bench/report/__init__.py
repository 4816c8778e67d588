"""Reports: the content of a folder as tables, figures and HTML."""
