"""The page of a run: ``log/report.html``."""

from .page import write

__all__ = ["write"]
