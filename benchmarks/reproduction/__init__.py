"""Step-KTO's finding on two synthetic tasks: tasks, first model, rounds, statistics, report."""
