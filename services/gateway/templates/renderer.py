"""Rendering of conversations by the checkpoint's template, or a request's own, in processes that can be killed.

Requests' own templates have processes of their own: they may be hostile, and wait for each other only.
"""

from collections.abc import Mapping

import msgspec

from services.gateway.request.chat import Rendering, template_failure
from services.gateway.request.template import TemplateSource
from services.gateway.templates.messages import (
    Failed,
    Refused,
    RenderTask,
    Reply,
    Setup,
    decode_reply,
    encode,
    encode_task,
)
from shared.errors import CheckpointError, RequestError, internal
from shared.log import logger
from shared.workers.pool import NoWorkerError, WorkerPool
from shared.workers.process import DiedError, TooSlowError

MODULE = "services.gateway.templates.worker"
PROCESSES = 2  # of each kind: one may be busy with a hostile template or a long conversation
CPU_S = 2  # a conversation that fills the context takes a twentieth
MEMORY_BYTES = 512 << 20

_log = logger(__name__)


class TemplateRenderer:
    """Processes that render conversations."""

    def __init__(self, template: TemplateSource, max_chars: int, environ: Mapping[str, str]) -> None:
        """`template` is the checkpoint's; `max_chars` bounds one prompt; `environ` is that of the processes."""
        self._template = template
        setup = encode(Setup(max_chars, MEMORY_BYTES))
        self._trusted = WorkerPool(MODULE, setup, environ, PROCESSES)
        self._foreign = WorkerPool(MODULE, setup, environ, PROCESSES)

    async def start(self) -> None:
        """Start a process and have it compile the checkpoint's template.

        Raises:
            CheckpointError: it does not compile.
            NoWorkerError: no process starts.
        """
        await self._trusted.start_one()
        reply = await _call(self._trusted, RenderTask(self._template, None, CPU_S))
        if isinstance(reply, Failed):
            raise CheckpointError(f"{self._template.name}: the chat template {reply.what}")

    async def render(self, rendering: Rendering) -> str:
        """Return the prompt of a conversation.

        Raises:
            RequestError: 400, the template refuses the conversation, or the prompt exceeds the limit, or the request's
                own template fails; 500, the checkpoint's does; 503, there is no process to render it.
        """
        own = rendering.own_template
        if own is None:
            pool, template = self._trusted, self._template
        else:
            pool, template = self._foreign, msgspec.structs.replace(self._template, name="chat_template", source=own)
        try:
            reply = await _call(pool, RenderTask(template, rendering.variables, CPU_S))
        except NoWorkerError as error:
            _log.error("no process renders templates", extra={"error": str(error)})
            raise internal("The server has no process that could render the prompt now.", "overloaded", 503) from error
        if isinstance(reply, Refused):
            raise RequestError(reply.failure)
        if isinstance(reply, Failed):
            raise template_failure(reply.what, template.name, own)
        return reply.text

    async def close(self) -> None:
        """End all processes."""
        await self._trusted.close()
        await self._foreign.close()


async def _call(pool: WorkerPool, task: RenderTask) -> Reply:
    """
    Raises:
        NoWorkerError: there is no process for it.
    """
    try:
        reply: Reply = decode_reply(await pool.call(encode_task(task)))
        return reply
    except TooSlowError:
        what = f"takes more than {CPU_S} s of computing"
    except DiedError:
        what = "makes the process that renders it crash"
    _log.warning("a template harms its process", extra={"template": task.template.name, "how": what})
    return Failed(what)
