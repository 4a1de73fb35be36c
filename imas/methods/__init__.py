"""One file a method. A new one is a file beside these and a line in ``METHODS`` of ``imas/build.py``."""
