"""instructor: every mode that it has for chat completions, and its partial and iterable answers."""

from collections.abc import Iterable

import instructor
import openai
import pytest
from asks import API_KEY, BASE_URL, MODEL, WEATHER_QUESTION, Report
from instructor import Mode
from pydantic import BaseModel

ASK = {"model": MODEL, "messages": [{"role": "user", "content": WEATHER_QUESTION}], "max_tokens": 400, "max_retries": 0}
SCHEMA = {"json": Report.model_json_schema()}
# The mode asks in words for a block of JSON, so that what it looks for in the answer is said beside it.
BLOCK = {
    "regex": r'```json\n\{"city": "[A-Za-z]{1,12}", "degrees": -?[0-4]?[0-9], "sky": "(sunny|cloudy|rainy)"\}\n```'
}
MODES = [
    (Mode.TOOLS, {}),
    (Mode.TOOLS_STRICT, {}),
    (Mode.JSON_SCHEMA, {}),
    (Mode.JSON, {"response_format": None, "structured_outputs": SCHEMA}),  # the mode itself asks for any object
    (Mode.MD_JSON, {"structured_outputs": BLOCK}),
]


class get_weather(BaseModel):
    """Current weather"""

    city: str


def client(mode):
    plain = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key=API_KEY, max_retries=0)
    return instructor.from_openai(plain, mode=mode).chat.completions


@pytest.mark.parametrize(("mode", "extra"), MODES, ids=[mode.name for mode, _ in MODES])
def test_a_type(mode, extra):
    assert isinstance(client(mode).create(**ASK, response_model=Report, extra_body=extra), Report)


@pytest.mark.parametrize(("mode", "extra"), MODES, ids=[mode.name for mode, _ in MODES])
def test_a_type_that_grows(mode, extra):
    *_, last = client(mode).create_partial(**ASK, response_model=Report, extra_body=extra)
    Report.model_validate(last.model_dump())


def test_parallel_tools():
    """The model chooses: instructor forces no call in this mode."""
    found = list(client(Mode.PARALLEL_TOOLS).create(**ASK, response_model=Iterable[get_weather]))
    assert [one.city for one in found] == ["Paris"]
