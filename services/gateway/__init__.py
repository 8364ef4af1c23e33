"""The gateway: an HTTP request becomes messages of the stream `encode` or `generate`, and deltas become its answer.

Read it as a request runs:

- `services/gateway/http/edge.py`: who asks.
- `services/gateway/http/handler.py`: one request, from its body to its last byte.
- `services/gateway/request/parsed.py`: what it means.
- `services/gateway/inflight/registry.py`: all requests that are open.
- `services/gateway/inflight/request.py`: one of them.
- `services/gateway/inflight/pipeline.py`: what Redis is told of it, and what it knows.
- `services/gateway/inflight/inbox.py`: what comes back.
- `services/gateway/http/stream.py`: what the client reads.

    http/        routes, limits and answers           request/      bytes to a parsed request; no Redis, no waiting
    dialects/    an API each: its fields, its events  inflight/     open requests, and the way to Redis and back
    tenants/     keys with limits                     batches/      files of requests, and the work on them
    templates/   chat templates, in processes         responses/    answers of the Responses API that are kept
    grammars/    grammars, tried in processes         console/, reference/    pages for a browser
"""
