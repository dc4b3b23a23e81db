#!/bin/sh
# Does the quantizer compute on CUDA what it computes on the CPU?
#   tools/checks/gpu.sh                  on a machine with an NVIDIA GPU
#   tools/checks/gpu.sh --device cpu     to try the script itself without a GPU
# Runs with the python3 on the path, or with $PYTHON, and installs nothing.
# Exit code 0: within tolerance; 1: not; 2: no CUDA device here.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
