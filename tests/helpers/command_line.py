"""`rpsa` in this process."""

from typing import Any

from typer.testing import CliRunner

from rpsa.cli import app


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))
