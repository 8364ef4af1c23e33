"""CUDA's Multi-Process Service for one launch: with it, engine and encoder compute on a GPU at the same time.

Its daemon is NVIDIA's, and comes with the driver. It starts a server when the first client does, and ends with it. Who
runs one for several programs names its directory in CUDA_MPS_PIPE_DIRECTORY, and then we start none.
"""

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.config import variable
from shared.errors import ConfigError

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS, DEVICES = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES"
PATIENCE_S = 30.0


def is_wanted(encoder: Mapping[str, str]) -> bool:
    """Return True if an encoder of this environment is to have a part of a GPU, and nobody else runs the service."""
    asked = encoder.get(variable("mps_percent"), "0") not in ("", "0")
    return asked and encoder.get(variable("device")) != "cpu" and PIPES not in encoder


@contextmanager
def daemon(directory: Path, environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Run the daemon, with its files in `directory`; yield what its clients need in their environment.

    Raises:
        ConfigError: it is not installed, or does not start.
    """
    directory.mkdir(mode=0o700)
    told = {PIPES: str(directory), LOGS: str(directory)}
    own, quiet = {**environ, **told}, subprocess.DEVNULL
    try:
        subprocess.run([CONTROL, "-d"], env=own, stdout=quiet, stderr=quiet, check=True, timeout=PATIENCE_S)
    except FileNotFoundError:
        raise ConfigError(
            f"{variable('mps_percent')}: {CONTROL}, which comes with NVIDIA's driver, is not installed; 0 does without"
        ) from None
    except (subprocess.SubprocessError, OSError) as error:
        raise ConfigError(f"{variable('mps_percent')}: {CONTROL} does not start: {error}") from None
    if DEVICES in environ:  # clients count the GPUs that the daemon sees
        told[DEVICES] = ",".join(map(str, range(len(environ[DEVICES].split(",")))))
    try:
        yield told
    finally:
        with suppress(subprocess.TimeoutExpired):  # it ends with its last client
            subprocess.run([CONTROL], env=own, input=b"quit\n", stdout=quiet, stderr=quiet, timeout=PATIENCE_S)
