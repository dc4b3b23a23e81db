#!/usr/bin/env bash
# Build stock llama-quantize from the source package of the pinned xllamacpp: tools/build_llama_quantize.sh OUT
# Used once to make tests/data/llama_quantize_types.json and to show that it takes our imatrix; about 20 minutes on 2 cores.
set -euo pipefail
out=$(realpath -m "${1:?usage: $0 OUT}")
version=$(sed -n 's/.*"xllamacpp==\([0-9.]*\)".*/\1/p' "$(dirname "$0")/../pyproject.toml")
mkdir -p "$out" && cd "$out"
if [ ! -d llama.cpp ]; then
  url=$(curl -fsSL "https://pypi.org/pypi/xllamacpp/$version/json" | python3 -c \
    'import json,sys; print(next(u["url"] for u in json.load(sys.stdin)["urls"] if u["packagetype"] == "sdist"))')
  curl -fsSL "$url" | tar xz
  mv "xllamacpp-$version/thirdparty/llama.cpp" .
fi
cmake -S llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF >/dev/null
cmake --build build --target llama-quantize -j "${JOBS:-2}"
ln -sf build/bin/llama-quantize llama-quantize
