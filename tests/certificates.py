"""A certificate authority of a test's own, and a server's certificate by it, made by openssl."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def make(directory: Path, names: Sequence[str]) -> None:
    """Write ca.crt, and tls.crt and tls.key of a server that is called by `names`: IP:127.0.0.1, DNS:localhost."""
    extensions = directory / "names.cnf"
    extensions.write_text(f"subjectAltName = {', '.join(names)}\n")
    _openssl(directory, "req", "-x509", *KEY, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=authority")
    _openssl(directory, "req", *KEY, "-keyout", "tls.key", "-out", "tls.csr", "-subj", "/CN=server")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", str(extensions), "-days", "2")
    _openssl(directory, "x509", "-req", "-in", "tls.csr", "-out", "tls.crt", *signed)


def _openssl(directory: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)
