"""Deliberate faults in the kernels, each of which the tests must catch: ``python -m tests.mutation.run``."""
