"""How many examples hypothesis tries: a few in the quick tests, all that a test asks for in `make test-integration`.

They are the same ones each time, so that what passed here passes elsewhere. To look for new ones:
`HYPOTHESIS_PROFILE=search pytest -m hypothesis`.
"""

import os

from hypothesis import settings

_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
_IS_QUICK = _PROFILE == "quick"
_QUICK = 30

settings.register_profile("quick", max_examples=_QUICK, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("search", max_examples=100, deadline=None)
settings.load_profile(_PROFILE)


def examples(count: int) -> settings:
    return settings(max_examples=min(count, _QUICK) if _IS_QUICK else count, deadline=None)
