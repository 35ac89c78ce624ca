"""Whether a built wheel holds what the checkout tracks, no more and no less, and a wheel of the sdist the same.

python .ci/contents.py WHEEL WHEEL-OF-THE-SDIST
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "pytest_pocket": "pytest_pocket",
    "tasks": "pytest_pocket/tasks",
    "backends": "pytest_pocket/backends",
    "training": "pytest_pocket/training",
}
"""As ``package-dir`` in pyproject.toml."""
WANTED = (
    "pytest_pocket/py.typed",
    "pytest_pocket/schema/run.json",
    "pytest_pocket/page/page.html",
    "pytest_pocket/training/chat_template.jinja",
    "pytest_pocket/training/recipes/tiny.toml",
    "pytest_pocket/training/checkpoints/sft-run6/model.safetensors",
)
"""Of each sort of data one, in case both sides lost it."""
ABOUT = (
    "METADATA",
    "RECORD",
    "WHEEL",
    "entry_points.txt",
    "top_level.txt",
    "licenses/LICENSE",
    "licenses/NOTICE",
)


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def main() -> None:
    """Compare; end with 1 and the names where they differ."""
    whole, again = (contents(Path(name)) for name in sys.argv[1:3])
    about = {name for name in whole if ".dist-info/" in name}
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", *FOLDERS], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    parts = [name.split("/", 1) for name in tracked]
    expected = {f"{FOLDERS[folder]}/{rest}" for folder, rest in parts}
    found = whole.keys() - about
    wrong = [f"missing: {name}" for name in sorted((expected | set(WANTED)) - found)]
    wrong += [f"not in the checkout: {name}" for name in sorted(found - expected)]
    wrong += [
        f"not as in the checkout: {name}"
        for name, (folder, rest) in zip(tracked, parts, strict=True)
        if whole.get(f"{FOLDERS[folder]}/{rest}") != (ROOT / name).read_bytes()
    ]
    wrong += [
        f"about the package, not expected: {name}" for name in about if name.split("/", 1)[1] not in ABOUT
    ]
    wrong += [f"not there: {name}" for name in ABOUT if not any(each.endswith(f"/{name}") for each in about)]
    wrong += [
        f"differs in the wheel of the sdist: {name}"
        for name in sorted(whole.keys() | again.keys())
        if whole.get(name) != again.get(name)
    ]
    print("\n".join([*wrong, f"{len(whole)} files, {sum(map(len, whole.values()))} bytes"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
