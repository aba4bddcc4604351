"""Where the figures of docs/benchmarks.md come from: one command each, ``python -m benchmarks.<name>``.

Each prints a table, writes ``benchmarks/results/<name>.json`` and ends with status 1 where a target is
missed. What is compared is compared within one run, so that a noisy machine does not matter.
"""
