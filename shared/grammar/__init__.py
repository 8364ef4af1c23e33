"""Grammars of constrained answers: how they are written (`forms`, `structural_tag`) and compiled (`compiler`).

The library behind all of it is llguidance; docs/structured-output.md says why. The gateway writes and checks a grammar,
the engine compiles it for its vocabulary.
"""
