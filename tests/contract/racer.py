"""One of the processes that race for prompts: claims till nothing is left, prints the ids it got as JSON.

Run as ``python -m tests.contract.racer URL WORKER LIMIT``; it waits for a line on standard input to start.
"""

from __future__ import annotations

import json
import sys

from text2img.databases import Collections, Selection, open_database


def main(url, worker, limit):
    database = open_database(url, Collections())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    got = []
    while prompts := database.claim(worker, int(limit), 60, Selection()):
        got.append([prompt.id.text for prompt in prompts])
    database.close()
    sys.stdout.write(json.dumps(got) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
