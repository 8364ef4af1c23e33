"""Builds Triton's link to the CUDA driver into a directory, with a stand-in for the C compiler beside it.

Triton compiles one C file of its own, with whatever CC names, in the first process that finds its cache empty. An image
that holds the result needs no compiler: its CC is a script that hands the result over, and refuses any other file.
Argument: the directory.
"""

import subprocess
import sys
from pathlib import Path

from triton.backends.nvidia import driver
from triton.runtime.build import _build

NAME = "cuda_utils"
STAND_IN = """#!/bin/sh
# Called as a compiler: SOURCE ... -o OUTPUT ...
here=$(dirname "$0")
if ! cmp -s "$1" "$here/{name}.c"; then
    echo "this image has no C compiler, and $1 is not the file it was built for" >&2
    exit 1
fi
while [ "$#" -gt 1 ] && [ "$1" != -o ]; do shift; done
exec cp "$here/{name}.so" "$2"
"""


def main(directory: Path) -> None:
    directory.mkdir(parents=True)
    source = directory / f"{NAME}.c"
    source.write_text(Path(driver.dirname, "driver.c").read_text())
    # The driver's library is the node's; an empty one of its name is enough to link to, if the linker keeps the name.
    library = directory / "libcuda.so.1"
    empty = ["gcc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run(empty, check=True)
    linked = ["-Wl,--no-as-needed", f"-L{directory}", "-l:libcuda.so.1"]
    built = _build(NAME, str(source), str(directory), [], driver.include_dirs, [], linked)
    Path(built).rename(directory / f"{NAME}.so")
    library.unlink()
    stand_in = directory / "cc"
    stand_in.write_text(STAND_IN.format(name=NAME))
    stand_in.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
