"""Puts what the tests of the chart share on the path, and the stand-in for Kubernetes that some of it imports."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "helm"), str(TESTS / "cli")]
