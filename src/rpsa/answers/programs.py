"""Programs in answers: the code block that is Python and defines the function that was asked for."""

import ast
import dis
import re
import textwrap
import warnings
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

_FENCE = re.compile(r"`{3,}|~{3,}")
# What follows an opening fence: its language and attributes, or else its language and the code.
_OPENING = re.compile(r"[^\n`]*\n|[ \t]*(?:python[\d.]*|py\d*)?[ \t]*", re.IGNORECASE)
_MOST_FENCES = 24
"""So many of the last fences are tried in every pairing, where no block will do."""


def code_block(text: str, entry_point: str | None = None) -> str | None:
    """The last code block of an answer that is Python and defines `entry_point` (None: any name).

    Blocks are CommonMark's, in whatever language they claim to be; one that was never closed ends with the text. Only
    where none will do come the fences that are none in CommonMark: one that opens on a line of prose or closes on a
    line of code, and one within a docstring that closes nothing.
    """
    found = (
        code for blocks in (_blocks, _any_fences) for code in blocks(text) if _defines(code, entry_point)
    )
    return next(found, None)


def defined_names(code: str) -> set[str]:
    """What `code` binds at its top level when it is imported: by `def`, `class`, `import` or assignment, inside an
    `if`, `try`, `with` or loop too, but not under a main guard. Empty if it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python thinks of a model's escapes is nobody's concern
            tree = ast.parse(code)
            tree.body = [kept for node in tree.body for kept in _imported(node)]
            program = compile(tree, "<answer>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return set()
    return {
        str(i.argval) for i in dis.get_instructions(program) if i.opname in ("STORE_NAME", "STORE_GLOBAL")
    }


def _imported(node: ast.stmt) -> list[ast.stmt]:
    """The statements of `node` that run when its module is imported: of `if __name__ == "__main__"` its `else`."""
    if isinstance(node, ast.If) and {"__name__", "__main__"} <= {
        getattr(part, "id", getattr(part, "value", None)) for part in ast.walk(node.test)
    }:
        return node.orelse
    return [node]


def _defines(code: str, entry_point: str | None) -> bool:
    if entry_point is None:
        return bool(defined_names(code))
    return entry_point in code and entry_point in defined_names(code)


def _blocks(text: str) -> Iterator[str]:
    """The contents of CommonMark's code blocks, the last one first."""
    for token in reversed(_commonmark().parse(text)):
        if token.type in ("fence", "code_block"):
            yield textwrap.dedent(token.content)


def _any_fences(text: str) -> Iterator[str]:
    """What stands between any two of the fences, or after one; from the last opening, the shortest first."""
    text = text.replace("\r\n", "\n")
    fences = list(_FENCE.finditer(text))[-_MOST_FENCES:]
    for n in reversed(range(len(fences))):
        if opening := _OPENING.match(text, fences[n].end()):
            for end in [*(closing.start() for closing in fences[n + 1 :]), len(text)]:
                yield textwrap.dedent(text[opening.end() : end])


@cache
def _commonmark() -> "MarkdownIt":
    """Blocks alone, and no HTML: a tag before a fence would swallow it."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").disable(["inline", "text_join", "html_block", "reference"])
