"""How many examples property-based tests try: few fixed ones in the suite, new ones in ``make fuzz``.

``tests/conftest.py`` loads one of the two Hypothesis profiles; HYPOTHESIS_PROFILE=fuzz chooses the second.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

SUITE = "suite"
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # both compare clocks


def load_profile() -> None:
    """Register both profiles, and load the one that the environment asks for."""
    # A suite must not fail for an example that it did not try on the commit before.
    settings.register_profile(SUITE, _COMMON, max_examples=40, derandomize=True, database=None)
    # Twice as many in each round, not a hundred times: tests.fuzz can end only between two rounds.
    settings.register_profile("fuzz", _COMMON, max_examples=80, derandomize=False, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", SUITE))


def examples(count: int) -> int:
    """Return the number of examples for a test that tries ``count`` of them in the suite."""
    return count * settings.default.max_examples // settings.get_profile(SUITE).max_examples
