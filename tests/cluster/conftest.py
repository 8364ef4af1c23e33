"""Puts on the path what tests of the chart and of chaos share, and the stand-in for Kubernetes that some import."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "helm"), str(TESTS / "cli"), str(TESTS / "chaos")]
