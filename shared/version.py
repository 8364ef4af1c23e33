"""The version of this program: one, of the package, the images and the chart."""

from importlib.metadata import PackageNotFoundError, version

from shared.errors import ConfigError

PACKAGE = "millrace"


def millrace_version() -> str:
    """Return the version as the installed package's metadata has it.

    Raises:
        ConfigError: the package is not installed; the message says how to.
    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise ConfigError(
            "the package millrace is not installed, only its source is here: run `make serve`, or "
            "`pip install --constraint constraints.txt --editable '.[cli]'`, in the source's directory"
        ) from None
