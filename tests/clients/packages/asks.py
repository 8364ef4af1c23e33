"""Questions, types and tools that the packages' tests share. They run in environments of their own: no code of ours."""

import json
import os
from typing import Any, Literal

from pydantic import BaseModel, Field

BASE_URL = os.environ["BASE_URL"]  # of the running system, without /v1
API_KEY = "none"
MODEL = "demo"
WEATHER_QUESTION = "What is the weather in Paris?"
FACT_QUESTION = "What is a mill race?"
FACT = "A mill race is the channel that leads water to the wheel of a mill."


class Report(BaseModel):
    """The weather of a city. Each field is bounded, so that any model comes to its end."""

    city: str = Field(max_length=12)
    degrees: int = Field(ge=-50, le=50)
    sky: Literal["sunny", "cloudy", "rainy"]


WEATHER_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def city_of(arguments: str) -> str:
    """The city in a call's arguments, which must be what the tool's schema says."""
    parsed = json.loads(arguments)
    assert set(parsed) == {"city"}
    city = parsed["city"]
    assert isinstance(city, str)
    assert len(city) <= 12
    return city
