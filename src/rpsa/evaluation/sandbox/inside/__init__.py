"""Sources that run on the far side of the wall. Each needs the standard library alone.

Their text is sent in, so that a sandbox sees nothing of the checkout. `namespaces` builds a sandbox; `entry` is
the first thing that runs in any; `seccomp` forbids system calls; `wire` turns values into text and back;
`candidate` serves a solution's function; `suite` runs tests against it; `together` runs both in one interpreter.
"""
