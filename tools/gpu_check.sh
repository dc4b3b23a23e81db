#!/bin/sh
# Does the quantizer compute on CUDA what it computes on the CPU? Runs with the image's own python; installs nothing.
#   tools/gpu_check.sh                  on a machine with an NVIDIA GPU
#   tools/gpu_check.sh --device cpu     the script itself, without a GPU
# Exit code 0: within tolerance; 1: not; 2: no CUDA device here.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
