"""Starts the job: ``python main.py [COMMAND] [flags]``, the same as the console script ``text2img``."""

import sys

from text2img import cli

if __name__ == "__main__":
    sys.exit(cli.main())
