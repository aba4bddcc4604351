"""How many workers a database serves: simulated ones, from 1 to 64, that claim and record as real ones do.

``python -m benchmarks.fleet`` measures; docs/scale.md says what is simulated and what follows.
"""
