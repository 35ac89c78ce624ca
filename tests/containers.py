"""Which engines of containers are on this machine: those must work."""

from __future__ import annotations

import shutil
import subprocess

from pytest_pocket.sandbox.container import image

ENGINES = ("docker", "podman")


def there(engine: str) -> bool:
    """Whether an engine runs here and has the image."""
    return bool(
        shutil.which(engine)
        and subprocess.run([engine, "image", "inspect", image()], capture_output=True).returncode == 0
    )
