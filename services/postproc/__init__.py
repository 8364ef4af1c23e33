"""The postproc: tokens come from the shards that it owns; text, reasoning and tool calls go to gateways as deltas.

Read it as tokens run:

- `services/postproc/worker.py`: the loop: read, fold, send, keep.
- `services/postproc/request_states.py`: all open requests.
- `services/postproc/request_state.py`: one of them.
- `services/postproc/text/answer.py`: tokens to an answer. All of `text/` is pure.
- `services/postproc/outbox.py`: what is written, and under which fence.
- `services/postproc/owned_shards.py`: which shards.
"""
