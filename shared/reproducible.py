"""Reproducible sums on CPUs: the same products give the same bits, whatever is computed beside them.

By default Intel's MKL, which multiplies matrices for torch on x86-64, chooses an order of sums by the number of rows,
by alignment and by the number of threads. In its strict reproducible mode it has one order for each row. Measured with
torch 2.13 on AVX-512: row counts of 2 to 8192, 1 to 8 threads, float32 and both 16-bit types; a single row is still
another routine. No slower at the real model's sizes, and up to some microseconds a product at the smallest.
"""

from collections.abc import MutableMapping

VARIABLE, MODE = "MKL_CBWR", "AUTO,STRICT"


def fix_order_of_sums(environ: MutableMapping[str, str]) -> None:
    """Ask for reproducible sums, unless the environment says otherwise. MKL reads it at its first product."""
    environ.setdefault(VARIABLE, MODE)
