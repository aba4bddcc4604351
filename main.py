"""Starts the job: ``python main.py [COMMAND] [flags]``, the same as the console script ``text2img``."""

try:
    import sys

    from text2img.__main__ import main

    if __name__ == "__main__":
        sys.exit(main())
except KeyboardInterrupt:  # in the first milliseconds, before main handles it
    import os

    os.write(2, b"text2img: stopped by signal 2\n")
    os._exit(130)
