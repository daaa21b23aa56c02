"""The examples a property test runs: few and new ones in the developer's loop, many and always the same ones in CI.

pytest's option `--hypothesis-profile` chooses one of the two; without it the environment variable CI does.
"""

import os

from hypothesis import settings

DEV, CI = "dev", "ci"

# 100 is hypothesis's own default. No deadline: a test may share its core with others. A commit that CI accepted must be
# accepted again, so CI draws the same examples each time; every run of profile dev draws new ones.
settings.register_profile(DEV, max_examples=10, deadline=None)
settings.register_profile(CI, max_examples=100, deadline=None, derandomize=True)


def load_default_profile() -> None:
    """Load the profile that holds where the command line names none."""
    settings.load_profile(CI if os.environ.get("CI") else DEV)


def examples(count: int) -> int:
    """Return `count` in profile ci, and at most 10 in profile dev."""
    profile = settings.default
    assert profile is not None, "a profile is loaded before the tests are imported"
    return min(count, profile.max_examples)
