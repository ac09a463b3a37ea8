"""Training with Step-KTO: data, sampling, rewards and the trainer.

Nothing is imported here: each submodule brings in only what it needs.
"""
