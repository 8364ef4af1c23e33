"""The mm_encoder: a prompt with pictures and videos comes from `encode`, and goes to `generate` with their embeddings.

Read it as a request runs:

- `services/mm_encoder/handler.py`: one request, from its entry to the engine.
- `services/mm_encoder/prepare.py`: bytes, then sizes, then pixels; every 4xx is found here.
- `services/mm_encoder/decoding/decoders.py`: the processes that read what strangers send.
- `services/mm_encoder/prompt.py`: placeholders in the prompt.
- `services/mm_encoder/store/cache.py`: embeddings that are there already.
- `services/mm_encoder/store/locks.py`: who makes the others.
- `services/mm_encoder/vision/batcher.py`, `services/mm_encoder/vision/encoder.py`: the vision tower.

    media/       fetching, and bytes to patches          vision/   patches to embeddings, on a GPU or without
    decoding/    the processes in which that happens     store/    embeddings in Redis and in memory, and their locks
"""
