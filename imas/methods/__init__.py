"""One file a method. A new method is a file beside these, a line in ``METHODS``, and an experiment's YAML."""

from __future__ import annotations

from .base import Method
from .imas import IMAS
from .stpp import STPP
from .sup_only import SupOnly

METHODS: dict[str, type[Method]] = {  # by the name of its section in a YAML
    "imas": IMAS,
    "stpp": STPP,
    "sup_only": SupOnly,
}
DEFAULT = "sup_only"  # of a file without such a section
