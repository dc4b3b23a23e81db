#!/bin/sh
# The first run on a GPU, in at most nine minutes: what the card is, whether the quantizer computes
# on it what it computes on the CPU, how long a 7B would take, and where the time goes.
#   tools/gpu_first_contact.sh OUT                         on a machine with an NVIDIA GPU
#   tools/gpu_first_contact.sh OUT --device cpu --small    to rehearse it without a GPU
# Runs with the python3 on the path, or with $PYTHON, and installs nothing.
# Exit code 0: all steps passed; 1: not all; 2: no CUDA device here.
set -eu
out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
PYTHONPATH=. exec "${PYTHON:-python3}" -m tools.checks.first_contact "$out" "$@"
