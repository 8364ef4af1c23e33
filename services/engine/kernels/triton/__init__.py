"""The operations in Triton, for CUDA devices, each with the signature of its torch reference. `common/` holds their
shared pieces, and moe/__init__.py says which path a step of experts takes.
"""
