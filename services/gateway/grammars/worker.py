"""Process that tries grammars: `python -m services.gateway.grammars.worker FD`, started by the gateway.

Its first message is the model directory. Each other is a grammar, its text as JSON, and is answered by null, or by why
the grammar is refused. It is tried in a fork of the process, which a hostile grammar may hang or crash: time, memory
and stack of the fork are limited, and no library could promise as much.
"""

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path

from services.gateway.grammars.trial import try_grammar
from shared.grammar.compiler import GrammarCompiler, GrammarError
from shared.model.tokenizer import Tokenizer
from shared.workers.link import Link, give_way

CPU_S = 1.5  # seconds of a core, so that a busy machine refuses nothing that a quiet one accepts
MEMORY_BYTES = 1 << 30  # beyond what the process has
STACK_BYTES = 2 << 20  # less than a thread of the engine has: what fits here fits there
SHOWN_CHARS = 500  # of what the library says
TOO_COMPLEX = "it is too complex: to compile and follow it takes too much time or memory"


def run(link: Link) -> None:
    """Work until the gateway closes its end of the link."""
    give_way()
    first = link.receive()
    assert first is not None
    tokenizer = Tokenizer.load(Path(first[0].decode()))
    # Any token may stand for the model's end tokens: they matter where an answer ends, not in whether it can.
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, (0,))
    link.send(b"")
    while (received := link.receive()) is not None:
        link.send(json.dumps(_verdict(compiler, json.loads(received[0]))).encode())


def _verdict(compiler: GrammarCompiler, text: str) -> str | None:
    """Return why a grammar is refused; None if it is not."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _try_in_limits(compiler, text, write)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:  # none of our limits: this says nothing of the grammar
        os.kill(os.getpid(), signal.SIGKILL)
    verdict: str | None = json.loads(said) if said else TOO_COMPLEX
    return verdict


def _try_in_limits(compiler: GrammarCompiler, text: str, pipe: int) -> None:
    """Write the verdict to `pipe`; a limit ends the process before that."""
    if sys.platform == "linux":  # elsewhere time alone is limited
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal is not handled, and so ends the process
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_report, args=(compiler, text, pipe))
    thread.start()
    thread.join()


def _report(compiler: GrammarCompiler, text: str, pipe: int) -> None:
    verdict = None
    try:
        try_grammar(compiler, text)
    except GrammarError as error:
        verdict = str(error).strip()[:SHOWN_CHARS]
    os.write(pipe, json.dumps(verdict).encode())


if __name__ == "__main__":
    run(Link(int(sys.argv[1])))
