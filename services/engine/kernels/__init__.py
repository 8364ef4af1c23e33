"""The model's operations. The torch function in each file of reference/ is the definition: the oracle of any other
implementation of the same name and signature, and the CPU's own. `ops.Ops` gathers them for the model,
`sampling_ops.SamplingOps` for the sampler; triton/ has them for GPUs.

Shapes use N rows (new tokens), S sequences, H hidden size, D head dimension, E experts in each pool, K experts a token.
Weights are [out, in], `in` contiguous.
"""
