"""Templates: texts as files in Jinja's language, in a folder `templates` beside the code that fills them.

What the template does not know is an error. HTML is escaped by itself. In Markdown and LaTeX names that others chose
go through a filter, `markdown`, `code` or `latex`; `form` is Python's `format`. A LaTeX template has `<<` and `<%`
where the others have `{{` and `{%`, since braces are its own.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from rpsa.text import latex_text, markdown_code, markdown_text

if TYPE_CHECKING:
    from jinja2 import Environment

Language = Literal["html", "md", "tex", "yaml"]

_DELIMITERS = {
    "variable_start_string": "<<",
    "variable_end_string": ">>",
    "block_start_string": "<%",
    "block_end_string": "%>",
    "comment_start_string": "<#",
    "comment_end_string": "#>",
}


def render(package: str, name: str, **values: Any) -> str:
    """The template `name` (`page.html`, say) of a package such as `rpsa.report`, filled with the values."""
    language = name.rpartition(".")[2]
    assert language in get_args(Language), name
    return _environment(package, language).get_template(f"{name}.jinja").render(values)


@cache
def _environment(package: str, language: str) -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    delimiters: dict[str, Any] = _DELIMITERS if language == "tex" else {}
    made = Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        autoescape=language == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **delimiters,
    )
    made.filters |= {"markdown": markdown_text, "code": markdown_code, "latex": latex_text, "form": format}
    return made
