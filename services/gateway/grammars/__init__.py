"""Checks of the grammars that requests ask for, in processes of their own."""
