"""Puts this folder on the path: its helpers serve the tests in the folders below."""
