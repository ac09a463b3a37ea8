"""The reproduction's results: JSON, tables and plot."""
