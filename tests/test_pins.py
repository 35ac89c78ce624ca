"""The pins that CI installs by hash are those of constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)


def pins(name: str) -> dict[str, str]:
    found = PIN.findall((ROOT / name).read_text())
    return {package.lower().replace("_", "-"): version for package, version in found}


def test_hashes_are_of_the_pinned_versions_and_of_all_but_torch() -> None:
    pinned = pins("constraints.txt")
    hashed = pins(".ci/hashes.txt")
    assert pinned.keys() - hashed.keys() == {"torch"}
    assert hashed.keys() - pinned.keys() == {"pip"}
    assert {name: pinned[name] for name in hashed.keys() & pinned.keys()} == {
        name: version for name, version in hashed.items() if name != "pip"
    }


def test_every_pin_has_a_hash() -> None:
    for name in (".ci/hashes.txt", ".ci/release.txt"):
        blocks = re.split(r"\n(?=[\w.-]+==)", (ROOT / name).read_text())[1:]
        assert blocks
        assert all("--hash=sha256:" in block for block in blocks)
