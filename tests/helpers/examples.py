"""How many examples hypothesis tries: a few in the quick tests, all that a test asks for in `make test-integration`."""

import os

from hypothesis import settings

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
_QUICK = 30

settings.register_profile("quick", max_examples=_QUICK, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile("thorough" if THOROUGH else "quick")


def examples(count: int) -> settings:
    return settings(max_examples=count if THOROUGH else min(count, _QUICK), deadline=None)
