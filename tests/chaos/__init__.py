"""Nothing lost, nothing twice: real processes, killed at named points, and what is left counted.

The points are reached from outside the product: gates before MongoDB and the bucket hold a message back, a
trigger in a SQLite file a statement, a listener a callback; and the database is watched. ``python -m
tests.chaos`` is the long form.
"""
