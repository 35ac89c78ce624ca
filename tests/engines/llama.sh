#!/bin/sh
# Builds llama.cpp's `llama-server` into .engines (ENGINES_DIR overrides it), once.
# The source is the one that llama-cpp-python's sdist carries: a package registry is all that is needed.
set -eu
cd "$(dirname "$0")/../.."
version=0.3.36
into=${ENGINES_DIR:-.engines}
PYTHON=${PYTHON:-python3}
stop() { echo "llama.sh: $1" >&2; exit 1; }

[ "$(cat "$into/llama.version" 2>/dev/null)" != "$version" ] || exit 0
for program in cmake g++; do
    command -v $program >/dev/null || stop "$program is missing: sudo apt install cmake g++"
done
mkdir -p "$into"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m pip download -q --no-deps --no-binary :all: -d "$work" "llama-cpp-python==$version"
tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
# A tiny model gains nothing from -O3, and the compiler's time is most of what this costs.
cmake -S "$work"/llama_cpp_python-*/vendor/llama.cpp -B "$work/build" \
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS_RELEASE="-O2" -DCMAKE_CXX_FLAGS_RELEASE="-O1" \
    -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_REPACK=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_ALL_WARNINGS=OFF -DGGML_ALL_WARNINGS=OFF >"$into/llama.log"
cmake --build "$work/build" --target llama-server -j "$(nproc)" >>"$into/llama.log" 2>&1 ||
    stop "the build failed: $into/llama.log says why"
cp "$work/build/bin/llama-server" "$into/llama-server"
strip "$into/llama-server"
echo "$version" >"$into/llama.version"
