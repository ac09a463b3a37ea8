"""Faults put into training and labelling, and what becomes of the result."""
