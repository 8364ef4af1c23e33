"""The engine: prompts come from `generate`, and their tokens go to `tokens:{shard}`, step by step.

Read it as a request runs:

- `services/engine/transport/handler.py`: from its entry to a sequence.
- `services/engine/transport/resume.py`: what earlier engines said of it.
- `services/engine/loop/engine.py`: the loop.
- `services/engine/schedule/scheduler.py`: what a step computes.
- `services/engine/schedule/sequence.py`: of whom.
- `services/engine/run/runner.py`: a plan carried out.
- `services/engine/run/step.py`: as tensors.
- `services/engine/model/ernie.py`: the layers.
- `services/engine/run/sampler.py`: the draw.
- `services/engine/transport/outbox.py`: tokens to Redis.

    transport/   asyncio and Redis                        run/       plans as tensors, CUDA graphs, sampling
    loop/        the model's thread, and its mailbox      model/     the decoder and its weights
    schedule/    batches, blocks, sequences; no torch     kernels/   operations: `reference/` defines, `triton/` is fast
    ranks/       the processes of several cards
"""
