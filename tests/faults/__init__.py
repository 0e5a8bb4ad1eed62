"""Faults done to the pipeline on purpose. `python -m tests.faults` does them all and prints what came of it."""
