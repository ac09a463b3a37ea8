"""Calls and training steps repeated thousands of times, and whether memory stays flat."""
