import logging
import re
import subprocess
import sys
from typing import Any

import pytest

from shared import log
from shared.errors import ConfigError


def line(message: str, exc_info: Any = None, **extra: object) -> str:
    record = logging.getLogger("part").makeRecord(
        "part", logging.WARNING, "file.py", 1, message, (), exc_info, extra=extra
    )
    return log.Logfmt("engine", "pod-1").format(record)


def test_order_of_fields() -> None:
    text = line("took it", shard=3, request_id="ab12")
    assert re.fullmatch(
        r"ts=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 level=warning service=engine replica=pod-1 logger=part "
        r'msg="took it" request_id=ab12 shard=3',
        text,
    )


@pytest.mark.parametrize("hostile", ["a\nlevel=error msg=forged", "x\r\x1b[2J", 'say "hi"', "\u2028", "a=b", "", "\\n"])
def test_one_line_whatever_the_value(hostile: str) -> None:
    text = line("m", value=hostile)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert text.endswith('"')  # quoted


def test_words_stay_bare() -> None:
    assert line("m", path="messages[0].content").endswith(" msg=m path=messages[0].content")


def test_a_message_is_not_said_twice() -> None:
    assert line("Started", color_message="\x1b[36mStarted\x1b[0m").endswith(" msg=Started")


def test_exception_in_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        text = line("failed", exc_info=sys.exc_info())
    assert len(text.splitlines()) == 1
    assert r"ValueError: two\nlines" in text
    assert "Traceback" in text


@pytest.mark.system
def test_setup_installs_once_and_filters() -> None:
    program = (
        "from shared import log; log.setup('s', 'n', 'info'); log.setup('s', 'n', 'info');"
        "log.logger('x').debug('hidden'); log.logger('x').info('shown', extra={'request_id': 'r'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "msg=shown request_id=r" in done.stderr


def test_unknown_level() -> None:
    with pytest.raises(ConfigError, match="MILLRACE_LOG_LEVEL"):
        log.setup("s", "n", "loud")
