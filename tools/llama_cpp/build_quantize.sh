#!/usr/bin/env bash
# Builds llama-quantize, unchanged, from the source package of the pinned xllamacpp.
#   tools/llama_cpp/build_quantize.sh OUT
# It was used to make tests/data/llama_quantize_types.json, and to show that it takes our imatrix.
# The build takes about 20 minutes on 2 cores.
set -euo pipefail
out=$(realpath -m "${1:?usage: $0 OUT}")
version=$(sed -n 's/.*"xllamacpp==\([0-9.]*\)".*/\1/p' "$(dirname "$0")/../../pyproject.toml")
mkdir -p "$out" && cd "$out"
if [ ! -d llama.cpp ]; then
  url=$(curl -fsSL "https://pypi.org/pypi/xllamacpp/$version/json" | python3 -c '
import json, sys
files = json.load(sys.stdin)["urls"]
print(next(file["url"] for file in files if file["packagetype"] == "sdist"))')
  curl -fsSL "$url" | tar xz
  mv "xllamacpp-$version/thirdparty/llama.cpp" .
fi
cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_SERVER=OFF >/dev/null
cmake --build build --target llama-quantize -j "${JOBS:-2}"
ln -sf build/bin/llama-quantize llama-quantize
