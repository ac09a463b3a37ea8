"""Tasks whose outcomes and steps are judged by exact checkers instead of a reward model."""
