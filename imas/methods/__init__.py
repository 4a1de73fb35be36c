"""One file a method. A new method is a file beside these, a line in ``METHODS``, and an experiment's YAML."""

from __future__ import annotations

from .augseg import AugSeg
from .base import Method
from .cps import CPS
from .fixmatch import FixMatch
from .imas import IMAS
from .psmt import PSMT
from .stpp import STPP
from .sup_only import SupOnly
from .u2pl import U2PL
from .unimatch import UniMatch

METHODS: dict[str, type[Method]] = {  # by the name of its section in a YAML
    "imas": IMAS,
    "sup_only": SupOnly,
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
    "augseg": AugSeg,
    "cps": CPS,
    "psmt": PSMT,
    "u2pl": U2PL,
    "stpp": STPP,
}
DEFAULT = "sup_only"  # of a file without such a section
