"""The model's operations, one a file. The torch function in each is its definition: the oracle of any other
implementation of the same name and signature, and what runs on a CPU. `ops.Ops` gathers them for the model,
`sampling_ops.SamplingOps` for the sampler.

Shapes use N rows (new tokens), S sequences, H hidden size, D head dimension, E experts in each pool, K experts a token.
Weights are [out, in], `in` contiguous.
"""
