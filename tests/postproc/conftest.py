"""Marker of a root: pytest puts this directory on the import path, so that tests in `text/` find the stand-in alone."""
