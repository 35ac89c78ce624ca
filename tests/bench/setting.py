"""Where and how a bench ran, for its JSON: a number without that says little."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_pocket.records import git

ROOT = Path(__file__).resolve().parents[2]


def setting(*packages: str, **more: Any) -> dict[str, Any]:
    """To be asked for before the work: the load is of that moment.  Warns where the machine is not quiet."""
    load = os.getloadavg()[0]
    if load > 1:
        print(f"the machine is busy (load {load:.1f}): only ratios mean anything", file=sys.stderr)
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return {
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
        "commit": git(ROOT).get("commit", ""),
        "changed": _changed(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        **more,
    }


def _changed() -> list[str]:
    """Files that differ from the commit, but for reports: benches write those one after the other."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", ":!reports"]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def write(report: dict[str, Any], out: Path | None) -> None:
    """The JSON, if there is to be one."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
