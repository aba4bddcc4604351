"""The program: ``python -m text2img``, the console script, and what ``main.py`` starts.

It imports only what Python has loaded anyway, and parses on old Pythons, which get one error line.
"""

import os
import signal
import sys
from contextlib import suppress

if sys.version_info < (3, 11):  # noqa: UP036 - for an older Python than this project is made for
    sys.stderr.write(
        "text2img needs Python 3.11 or newer; this is Python {}.{}\n".format(*sys.version_info[:2])
    )
    sys.exit(2)


def main() -> int:
    """Run the command line, and return the exit status.

    A signal that arrives while no command handles it, during imports or at the end, ends the process at once.
    """

    def leave(number: int, frame: object) -> None:
        del frame
        status = 143 if number == signal.SIGHUP else 128 + number
        message = f"stopped by signal {number}"
        # The module may be half imported.
        is_complete = getattr(sys.modules.get("text2img.telemetry.terminal"), "is_complete", None)
        has_result = is_complete is not None and is_complete()
        if "--json" in sys.argv and "compare" not in sys.argv[1:2] and not has_result:
            _write(1, f'{{"error": "{message}", "status": {status}}}\n')
        _write(2, f"text2img: {message}\n")
        os._exit(status)

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, leave)
    from text2img import cli

    return cli.main()


def _write(number: int, text: str) -> None:
    with suppress(OSError):  # nothing reads it
        os.write(number, text.encode())


if __name__ == "__main__":
    sys.exit(main())
