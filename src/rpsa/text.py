"""Texts of others: names of users, and what models, servers and files say, shown as nothing but text."""

import re

SECRET_IN_QUERY = r"[?&][^=&\s]*(?:(?i:key|token|sig|signature|secret|passw(?:or)?d|pwd|credential|auth))="
"""Before a secret in an address."""


def printable(text: str) -> str:
    """`text` on one line, without characters that a terminal acts upon: each becomes its escape."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def hide_credentials(text: str) -> str:
    """`text` without the user, the password and the keys of any address in it."""
    return re.sub(rf"({SECRET_IN_QUERY})[^&\s:,;'\"]*", r"\1***", re.sub(r"://[^/\s@]*@", "://***@", text))


def markdown_text(text: str) -> str:
    """`text` on one line of Markdown, where it can be nothing but text: no cell, no HTML, no emphasis, no link."""
    return re.sub(r"([\\`*|<>\[\]~$#&]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z]))", r"\\\1", printable(text))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{c: f"{{{c}}}" for c in "[]"},  # an optional argument, at the beginning of a row
}


def latex_text(text: str) -> str:
    """`text` that TeX sets as it is, on one line."""
    return "".join(_LATEX.get(character, character) for character in printable(text))


def markdown_code(text: str) -> str:
    """`text` in Markdown's code font, on one line."""
    return f"`{printable(text).replace('`', chr(39))}`"


def json_problem(error: Exception) -> str:
    """What is wrong with a text that is no JSON, or none that Python takes, in a few words."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return printable(str(error))
