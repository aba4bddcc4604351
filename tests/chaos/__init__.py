"""Nothing lost, nothing twice: real processes, killed at named points, and what is left counted.

The points are reached from outside the product: gates before its database and its bucket hold a message
back, a listener holds a callback, and the database is watched. ``python -m tests.chaos`` is the long form.
"""
