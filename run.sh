#!/bin/sh
# Sets everything up, then runs:
#   sh run.sh          the embedded model through the 19 tasks (more arguments go to pytest)
#   sh run.sh tests    the project's own tests (more arguments go to pytest); those of engines that are not
#                      there are skipped: sh tests/engines/llama.sh and vllm.sh make them
#   sh run.sh reports  the tables of the documents and reports/page.html, from the committed runs
# The environment is .venv (VENV overrides it), pinned by constraints.txt; with POCKET_HASHES=1 by hash, but for torch.
# PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")"
export HF_HUB_OFFLINE=1
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
stop() { echo "run.sh: $1" >&2; exit 1; }

command -v "$PYTHON" >/dev/null || stop "$PYTHON is missing: sudo apt install python3 python3-venv"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "$("$PYTHON" --version) is too old: pytest-pocket needs 3.11 or newer; set PYTHON=python3.11"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || stop "the venv module is missing: sudo apt install python3-venv"
if [ "$(uname)" = Linux ]; then
    missing=
    command -v bwrap >/dev/null || missing="$missing bubblewrap"
    # The sandbox shows the system's own programs to the model, so these must be the system's.
    for program in git python3; do
        [ -x "/usr/bin/$program" ] || [ -x "/usr/local/bin/$program" ] || missing="$missing $program"
    done
    # The tests look at the report page in a real browser.
    [ "${1:-}" != tests ] || browser || missing="$missing chromium"
    [ -z "$missing" ] || stop "missing system packages: sudo apt install$missing"
fi

wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$VENV/.ready" 2>/dev/null)" != "$wanted" ]; then
    echo "run.sh: setting up $VENV (a few minutes the first time)" >&2
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    # CI's own: every file by its hash, and before anything else, so that what follows finds it there.
    [ -z "${POCKET_HASHES:-}" ] || "$VENV/bin/python" -m pip install -qq --require-hashes --no-deps -r .ci/hashes.txt
    # torch first and pinned: unpinned, other packages may pull another build of it.
    "$VENV/bin/python" -m pip install -qq --upgrade "pip>=25.1" -c constraints.txt
    "$VENV/bin/python" -m pip install -qq torch -c constraints.txt
    "$VENV/bin/python" -m pip install -qq -e '.[hf,train,xdist,ray,export,report,verify,openai,ollama]' --group test --group lint -c constraints.txt
    echo "$wanted" >"$VENV/.ready"
fi

if [ "${1:-}" = tests ]; then
    shift
    # A worker that crashes ends the run: with groups of tests, xdist would wait for ever for what that worker had left.
    exec "$VENV/bin/python" -m pytest tests -n 2 --max-worker-restart 0 --timeout 600 "$@"
fi
if [ "${1:-}" = reports ]; then
    "$VENV/bin/python" reports/render.py
    exec "$VENV/bin/pocket" report reports/*-runs -o reports/page.html
fi
exec "$VENV/bin/python" -m pytest --pocket-model=sft-run6 --runs=3 "$@"
