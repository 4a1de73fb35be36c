"""Split lists: which they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def digest(names: Iterable[str]) -> str:
    """SHA-256 of a list, whatever its order: over the sorted names, each ended by a newline (spec, Splits)."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).hexdigest()
