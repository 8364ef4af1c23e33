"""The version of this program: one, of the package, the images and the chart. Tests hold what repeats it to this."""

MILLRACE_VERSION = "0.1.0"
