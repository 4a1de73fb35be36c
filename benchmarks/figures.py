"""What the benchmarks make of their measurements."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from pathlib import Path


def spread(twin: Iterable[float], ours: Iterable[float]) -> dict[str, float]:
    """Ratios of neighbours in the alternation: above 1, ours is faster."""
    ratios = [slow / fast for slow, fast in zip(twin, ours)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def in_words(ratio: dict[str, float]) -> str:
    """``spread`` in a cell of a table: median (min..max)."""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})"


def resident_peak() -> int:
    """Bytes, of this process so far (``ru_maxrss`` would begin with that of the process that started this one)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 2**10
