"""Puts on the path what the tests of the chart share: containers run as its pods do, beside a stand-in for its API."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "helm"), str(TESTS / "cli")]
