# Sourced by single_run.sh and tests/run.sh: sets PYTHON to an interpreter that satisfies requirements.txt.
# The active python is used as it is if it does; otherwise .venv is made, or mended, and used.
# With REQUIREMENTS=FILE in the environment that file must be satisfied as well.

satisfied() {  # satisfied PYTHON
    "$1" - requirements.txt $REQUIREMENTS >/dev/null 2>&1 <<'PYTHON'
import re, sys
from importlib.metadata import version

def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]]

assert sys.version_info >= (3, 11)
for name in sys.argv[1:]:
    for line in open(name):
        if line.strip():
            package, minimum = line.split(">=")
            assert numbers(version(package)) >= numbers(minimum), line
import torchvision  # fails beside a torch that it was not made for
PYTHON
}

new_enough() { command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }

PYTHON=
for candidate in python3 python python3.11 python3.12 python3.13; do
    new_enough $candidate && PYTHON=$candidate && break
done
if [ -z "$PYTHON" ]; then
    echo "error: Python 3.11 or newer is needed, and none was found" >&2
    exit 2
fi
if ! satisfied "$PYTHON"; then
    SYSTEM_PYTHON=$PYTHON
    PYTHON=$PWD/.venv/bin/python
    if ! satisfied "$PYTHON"; then
        # One set-up at a time: the tasks of a node wait for the first. The lock is of this shell's file number 9.
        exec 9> .venv.lock
        "$SYSTEM_PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || echo "no lock on this file system" >&2
    fi
    if ! satisfied "$PYTHON"; then
        echo "Setting up .venv from requirements.txt, once: some minutes, about 5 GB."
        [ -x "$PYTHON" ] || "$SYSTEM_PYTHON" -m venv .venv || {
            echo "error: could not make .venv (on Debian and Ubuntu: apt install python3-venv)" >&2
            exit 2
        }
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt ${REQUIREMENTS:+-r $REQUIREMENTS} || {
            echo "error: pip could not install requirements.txt; its messages are above" >&2
            exit 2
        }
        satisfied "$PYTHON" || {
            echo "error: .venv does not satisfy requirements.txt after the set-up; remove it and start again" >&2
            exit 2
        }
    fi
    exec 9>&-
fi
