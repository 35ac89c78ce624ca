#!/bin/sh
# An environment of its own for each peer, in .peers, beside ours in .venv: sh tests/bench/peers/setup.sh
set -eu
here=$(cd "$(dirname "$0")" && pwd)
sh "$here/../../../run.sh" --pocket-list >/dev/null
for list in "$here"/requirements/*.txt; do
    environment=$here/../../../.peers/$(basename "$list" .txt)
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet --requirement "$list"
done
# verifiers installs its own loop, with uv, before the first rollout.
"$here/../../../.peers/verifiers/bin/python" "$here/verifiers_local.py" --in-flight 1 --episodes 1
