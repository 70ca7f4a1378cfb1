"""Templates: what is missing is an error, and what others chose is escaped."""

import pytest
from jinja2 import UndefinedError

from rpsa import templates
from rpsa.templates import _environment


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        templates.render("rpsa.report", "page.html")


@pytest.mark.parametrize(
    ("language", "template", "expected"),
    [
        ("html", "{{ name }}", "&lt;b&gt; | `c` &amp; 5%"),
        ("md", "{{ name | markdown }}", r"\<b\> \| \`c\` \& 5%"),
        ("md", "{{ name | code }}", "`<b> | 'c' & 5%`"),
        ("tex", "<< name | latex >>", r"\textless{}b\textgreater{} | `c` \& 5\%"),
        ("tex", "{<< 1234 | form(',') >>}", "{1,234}"),
    ],
)
def test_each_language_has_its_escapes(language: str, template: str, expected: str) -> None:
    made = _environment("rpsa.report", language).from_string(template)
    assert made.render(name="<b> | `c` & 5%") == expected
