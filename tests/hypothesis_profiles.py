"""The number of examples a property test runs: few in the developer's loop, all in CI.

pytest's option `--hypothesis-profile` chooses one of the two; without it the environment variable CI does.
"""

import os

from hypothesis import settings

DEV, CI = "dev", "ci"

# 100 is hypothesis's own default. No deadline: a test may share its core with others.
settings.register_profile(DEV, max_examples=10, deadline=None)
settings.register_profile(CI, max_examples=100, deadline=None)


def load_default_profile() -> None:
    """Load the profile that holds where the command line names none."""
    settings.load_profile(CI if os.environ.get("CI") else DEV)


def examples(count: int) -> int:
    """Return `count` in profile ci, and at most 10 in profile dev."""
    profile = settings.default
    assert profile is not None, "a profile is loaded before the tests are imported"
    return min(count, profile.max_examples)
