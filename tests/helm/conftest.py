"""Puts on the path: the schema's writer, which lives in the chart, and the stand-in for Kubernetes's API."""

import sys

from helm_chart import CHART, ROOT

sys.path += [str(CHART), str(ROOT / "tests" / "cli")]
