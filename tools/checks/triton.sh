#!/bin/sh
# Tests the kernels of the column loop and of the descent under Triton's interpreter, against the
# plain loops, and compiles them for an H100. This needs no GPU and takes minutes. Triton (286 MB to
# fetch) goes into an environment of its own, .venv-triton, which also sees the packages of .venv.
set -eu
cd "$(dirname "$0")/../.."
if [ ! -x .venv-triton/bin/python ]; then
    .venv/bin/python -m venv .venv-triton
    .venv-triton/bin/pip install --quiet --no-deps "triton>=3.5"
    for site in .venv-triton/lib/python*/site-packages; do
        echo "import site; site.addsitedir('$PWD/.venv/${site#.venv-triton/}')" >"$site/base.pth"
    done
fi
TRITON_INTERPRET=1 VLMQ_REQUIRE=triton \
    .venv-triton/bin/python -m pytest -q tests/quantizer/solver/test_kernels.py "$@"
