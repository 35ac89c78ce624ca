"""Wiring for this checkout only: nothing that an installed pytest-pocket would miss."""

pytest_plugins = ["pytester"]
