"""What a sandbox shows of the host: this Python, its standard library, shared libraries, chosen packages.

Python is shown under /python wherever it is installed, so that no home folder's path is to be seen.
"""

import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

from rpsa.errors import RPSAError

PYTHON = "/python/bin/python3"
PYTHON_FLAGS = ("-s", "-S", "-P", "-B")
PACKAGES_FOLDER = "/packages"
ENVIRONMENT = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "LD_LIBRARY_PATH": "/python/lib",
    # the same order of sets, and so the same verdict, in every run
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_LIBRARY_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


@dataclass(frozen=True)
class View:
    """`show`: (real path on the host, path inside), read-only; `links`: (text of a symbolic link, path inside)."""

    show: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]


@cache
def view(packages: tuple[str, ...]) -> View:
    """What to show so that Python runs and imports `packages` (names of distributions)."""
    base = os.path.realpath(sys.base_prefix)
    show = [(os.path.realpath(sys._base_executable), PYTHON)]  # type: ignore[attr-defined]
    links = []
    for name in sorted({"lib", sys.platlibdir}):
        if os.path.isdir(f"{base}/{name}"):
            show.append((os.path.realpath(f"{base}/{name}"), f"/python/{name}"))
    for folder in _LIBRARY_FOLDERS:
        if os.path.islink(folder):
            links.append((os.readlink(folder), folder))
        elif os.path.isdir(folder):
            show.append((folder, folder))
    show += [(path, f"{PACKAGES_FOLDER}/{os.path.basename(path)}") for path in package_paths(packages)]
    return View(tuple(show), tuple(links))


def package_paths(packages: tuple[str, ...]) -> list[str]:
    """The files and folders of `packages` at the top of site-packages. Raises RPSAError if one is not there."""
    found = set()
    for name in packages:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            raise RPSAError(
                f"package {name!r} is to be shown to programs but is not installed: pip install {name}"
            ) from None
        tops = {file.parts[0] for file in package.files or ()} - {".."}
        found |= {os.path.realpath(str(package.locate_file(top))) for top in tops}
    return sorted(path for path in found if os.path.exists(path))
