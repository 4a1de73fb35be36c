#!/bin/sh
# The whole test suite, in two processes; arguments go to pytest.
set -e
cd "$(dirname "$0")/.."
REQUIREMENTS=tests/requirements.txt
. ./env.sh
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
