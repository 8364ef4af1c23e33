"""Process that renders templates: `python -m services.gateway.templates.worker FD`, started by the gateway.

It works under limits of memory and of CPU time that the kernel enforces: a template may loop without end, in Jinja or
in Python's own integers and strings, already while it is compiled. Jinja's sandbox limits neither.
"""

import gc
import sys
from functools import lru_cache

import msgspec

from services.gateway.request.template import Template, TemplateFailureError, TemplateSource
from services.gateway.templates.messages import (
    Failed,
    Refused,
    Rendered,
    RenderTask,
    Reply,
    decode_setup,
    decode_task,
    encode,
)
from shared.errors import RequestError
from shared.workers.link import Link, give_way, limit_memory, limit_time

KEPT = 4  # compiled templates


def run(link: Link) -> None:
    """Work until the gateway closes its end of the link."""
    first = link.receive()
    assert first is not None
    setup = decode_setup(first[0])
    give_way()
    limit_memory(setup.memory_bytes)
    compiled = _Compiled(setup.max_chars)
    gc.freeze()  # the collector then looks at what tasks make alone
    link.send(b"")
    while (received := link.receive()) is not None:
        link.send(_answer(compiled, decode_task(received[0])))


class _Compiled:
    """Templates that were compiled last."""

    def __init__(self, max_chars: int) -> None:
        self.get = lru_cache(KEPT)(self._compile)
        self._max_chars = max_chars

    def _compile(self, template: bytes) -> Template:
        return Template(msgspec.msgpack.decode(template, type=TemplateSource), self._max_chars)


def _answer(compiled: _Compiled, task: RenderTask) -> bytes:
    limit_time(task.cpu_s)
    try:
        return encode(_render(compiled, task))
    except MemoryError:
        compiled.get.cache_clear()
        return encode(Failed("takes too much memory"))
    except UnicodeEncodeError:
        return encode(Failed("wrote a lone surrogate"))


def _render(compiled: _Compiled, task: RenderTask) -> Reply:
    try:
        template = compiled.get(encode(task.template))
        return Rendered("" if task.variables is None else template.render(task.variables))
    except RequestError as error:
        return Refused(error.failure)
    except TemplateFailureError as error:
        return Failed(str(error))


if __name__ == "__main__":
    run(Link(int(sys.argv[1])))
