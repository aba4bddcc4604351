"""Several workers for one run, each in its own process, on one or more machines. Only this package uses Ray.

``process`` starts or joins Ray, starts worker processes and exchanges messages with them. ``remote`` is what
runs in such a process, ``pool`` manages all of them for the run.
"""
