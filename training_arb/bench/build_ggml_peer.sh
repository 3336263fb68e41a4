#!/usr/bin/env bash
# Build ggml's CPU library, the competitor of scripts/bench_kernels.py, into a folder outside the repository.
#
# The source is the one that the llama-cpp-python sdist carries. The sdist leaves out ggml.pc.in, which cmake wants, so a
# stub of three lines takes its place. Release, for this machine's instructions, with OpenMP: about a minute on one core.
# Needs a C++ compiler, cmake and a Python with pip. Run by hand only, never by the tests.
#
# examples:
#   training_arb/bench/build_ggml_peer.sh ~/ggml-peer
#   PYTHON=.venv/bin/python JOBS=4 VERSION=0.3.36 training_arb/bench/build_ggml_peer.sh ~/ggml-peer
#   ARB_GGML=~/ggml-peer python scripts/bench_kernels.py --ops cpu_matvec
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: training_arb/bench/build_ggml_peer.sh FOLDER" >&2
    exit 2
fi
repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
case "$folder/" in
"$repository"/*)
    echo "error: FOLDER=$1 must lie outside the repository" >&2
    exit 2
    ;;
esac
version=${VERSION:-0.3.36}
python=${PYTHON:-python3}

if ! compgen -G "$folder/sdist/llama_cpp_python-$version.tar.gz" >/dev/null; then
    "$python" -m pip download --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
        --dest "$folder/sdist" "llama-cpp-python==$version"
fi
rm -rf "$folder/source"
mkdir "$folder/source"
tar -xzf "$folder/sdist/llama_cpp_python-$version.tar.gz" -C "$folder/source" --strip-components=4 \
    "llama_cpp_python-$version/vendor/llama.cpp/ggml"
printf 'Name: ggml\nDescription: stub\nVersion: @GGML_VERSION@\n' >"$folder/source/ggml.pc.in"

cmake -S "$folder/source" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON \
    -DGGML_OPENMP=ON -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF
cmake --build "$folder/build" --parallel "${JOBS:-1}" --target ggml-cpu
echo "ARB_GGML=$(find "$folder/build" -name libggml-cpu.so -print -quit)"
