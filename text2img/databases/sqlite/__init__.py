"""Prompts and results in one SQLite file, for one machine, through the Protocols of text2img.databases.

The tables can be filled and read in the sqlite3 shell. Network file systems do not work: their locks are
unreliable.
"""
