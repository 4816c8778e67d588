"""Reports: what a folder holds, as tables, figures and HTML."""
