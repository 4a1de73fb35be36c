#!/bin/sh
# The whole test suite, in two processes on the CPU; arguments go to pytest. For GPUs: tests/gpu/first.sh.
set -e
cd "$(dirname "$0")/.."
REQUIREMENTS=tests/requirements.txt
. ./env.sh
export CUDA_VISIBLE_DEVICES=  # some tests train in their own process, and hold what a CPU repeats bitwise
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
