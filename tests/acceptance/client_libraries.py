"""What client libraries do with a service, unchanged: `python -m tests.acceptance.client_libraries URL`.

It runs in an environment of its own, because the libraries need other versions of packages than the service. It prints
a line of JSON for each check: name, and the error if it failed.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import instructor
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.acceptance.library_checks import run_checks

MODEL = "smollm2-135m-instruct"
ASKED = "Paris has 14 degrees celsius."
PACKAGES = ("instructor", "langchain-openai", "pydantic-ai-slim", "openai")


class Unit(enum.StrEnum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=20)
    unit: Unit
    degrees: int = Field(ge=-50, le=50)


def get_weather(city: str, unit: Unit) -> str:
    """Return the weather of a city."""
    return f"14 degrees {unit} in {city}"


def get_time(zone: str) -> str:
    """Return the time of a zone."""
    return f"noon in {zone}"


WEATHER: Any = tool(get_weather)


class Checks:
    def __init__(self, url: str) -> None:
        self.openai = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        self.langchain = ChatOpenAI(
            base_url=f"{url}/v1", api_key="unused", model=MODEL, max_tokens=200, temperature=0, max_retries=0
        )
        provider = OpenAIProvider(base_url=f"{url}/v1", api_key="unused")
        self.pydantic_ai = OpenAIChatModel(MODEL, provider=provider)

    def all(self) -> dict[str, Callable[[], Any]]:
        modes = (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA)
        methods = ("function_calling", "json_schema")
        return {
            **{f"instructor {mode.name}": partial(self.instructor, mode) for mode in modes},
            **{f"langchain {method}": partial(self.structured, method) for method in methods},
            "langchain tools": self.langchain_tools,
            "langchain stream": self.langchain_stream,
            "pydantic-ai output": self.pydantic_ai_output,
            "pydantic-ai tools": self.pydantic_ai_tools,
        }

    def instructor(self, mode: instructor.Mode) -> None:
        client = instructor.from_openai(self.openai, mode=mode)
        messages: Any = [{"role": "user", "content": ASKED}]
        fields: Any = {"messages": messages, "max_tokens": 200, "max_retries": 0}
        assert isinstance(client.chat.completions.create(model=MODEL, response_model=Weather, **fields), Weather)

    def structured(self, method: Any) -> None:
        assert isinstance(self.langchain.with_structured_output(Weather, method=method).invoke(ASKED), Weather)

    def langchain_tools(self) -> None:
        called = self.langchain.bind_tools([WEATHER], tool_choice="get_weather").invoke(ASKED)
        assert isinstance(called.content, str)
        (call,) = called.tool_calls
        result = ToolMessage(WEATHER.invoke(call["args"]), tool_call_id=call["id"])
        answer = self.langchain.bind_tools([WEATHER]).invoke([HumanMessage(ASKED), called, result])
        assert answer.content or answer.tool_calls

    def langchain_stream(self) -> None:
        bound = self.langchain.bind_tools([WEATHER], tool_choice="any", parallel_tool_calls=False)
        first, *rest = bound.stream(ASKED)
        for chunk in rest:
            first = first + chunk
        (call,) = first.tool_calls
        assert WEATHER.invoke(call["args"])

    def pydantic_ai_output(self) -> None:
        settings: Any = {"max_tokens": 200, "parallel_tool_calls": False}
        assert isinstance(
            Agent(self.pydantic_ai, output_type=Weather, model_settings=settings).run_sync(ASKED).output, Weather
        )

    def pydantic_ai_tools(self) -> None:
        agent: Any = Agent(self.pydantic_ai, model_settings={"max_tokens": 60})
        agent.tool_plain(get_time)
        assert agent.run_sync("What time is it in UTC?").output


if __name__ == "__main__":
    run_checks(PACKAGES, Checks(sys.argv[1]).all())
