"""Checks of the test suite's own code, run by ``make check`` as ``python -m tests.lint``."""
