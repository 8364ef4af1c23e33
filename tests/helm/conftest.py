"""Puts the schema's writer, which lives in the chart, on the path."""

import sys

from helm_chart import CHART

sys.path.insert(0, str(CHART))
