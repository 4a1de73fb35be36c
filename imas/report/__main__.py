"""The page of a run, or of several side by side: one HTML file that needs nothing else and loads nothing.

    python -m imas.report exps/shapes_imas                          # rebuilds exps/shapes_imas/log/report.html
    python -m imas.report exps/shapes_sup exps/shapes_imas          # side by side, into report.html here

RUN is a folder with log/ in it (that of a trained YAML, or of train_semi.py --out), or the log folder itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import run_script
from . import write


def main() -> None:
    """Write the page that the command line asks for, and print where."""
    parser = argparse.ArgumentParser("imas.report", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: log/report.html; of several, report.html")
    options = parser.parse_args()
    print(f"report: {write(options.runs, options.out)}")


if __name__ == "__main__":
    run_script(main)
