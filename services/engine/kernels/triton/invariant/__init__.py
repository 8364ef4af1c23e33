"""Batch-invariant operations: a row's result is the same bits whatever else a step computes, however a prompt is cut.

The fastest operations choose their tiles, splits and libraries by how many rows a step has, and each choice rounds
sums in another order. These have one order for each row: no output's inputs are split over programs, blocks of inputs
and the rows of the matrix instruction's other operand are fixed, so only how many rows share a tile may vary, which no
row's sum depends on; nothing is left to the vendor library; and attention walks over all keys from the first one on, in
tiles of a fixed length. tests/engine/kernels/test_batch_invariant.py compares bits, docs/guarantees.md states the cost.
"""
