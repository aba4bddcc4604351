"""One of the processes that race for prompts: claims till nothing is left, prints the ids it got as JSON.

Run as ``python -m tests.contract.racer URL WORKER``. Each line on standard input starts a race, and holds how
many prompts to claim at once.
"""

from __future__ import annotations

import json
import sys

from text2img.databases import Collections, Selection, open_database


def main(url, worker):
    database = open_database(url, Collections())
    _say("ready")
    for limit in sys.stdin:
        got = []
        while prompts := database.queue.claim(worker, int(limit), 60, Selection()):
            got.append([prompt.id.text for prompt in prompts])
        _say(json.dumps(got))
    database.close()


def _say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
