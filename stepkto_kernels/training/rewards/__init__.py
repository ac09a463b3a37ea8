"""Rewards: is the answer right, and is each step. base.py says what they have in common."""
