"""Whether a tag names the version that the package and the changelog have: python .ci/version.py v0.1.0"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """End with a line for each place that says another version, and 1."""
    tag = sys.argv[1].removeprefix("v")
    source = (ROOT / "pytest_pocket/__init__.py").read_text()
    suite = re.search(r'^SUITE_VERSION = "(.+)"$', (ROOT / "pytest_pocket/task.py").read_text(), re.MULTILINE)
    heading = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    wanted = rf"{re.escape(tag)} \(suite {re.escape(suite[1] if suite else '?')}\), \d{{4}}-\d\d-\d\d"
    wrong = {
        "pyproject.toml": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] != tag,
        "pytest_pocket/__init__.py": f'__version__ = "{tag}"' not in source,
        "the first heading of CHANGELOG.md (VERSION (suite N), DATE)": not (
            heading and re.fullmatch(wanted, heading[1])
        ),
    }
    for place in (place for place, is_wrong in wrong.items() if is_wrong):
        print(f"{place} does not say {tag}")
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
