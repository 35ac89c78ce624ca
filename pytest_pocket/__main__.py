"""``python -m pytest_pocket``: the ``pocket`` command, where no entry point is on the path."""

from pytest_pocket.cli import app

app(prog_name="pocket")
