"""The same operations in Triton, for CUDA devices: one op a file, each with the signature of its torch reference."""
