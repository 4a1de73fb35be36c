"""Methods × seeds: the runs, and one table of them (``python -m imas.compare``)."""
