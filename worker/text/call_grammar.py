"""Grammars of answers with reasoning or tool calls, in llguidance's Lark syntax (its docs/syntax.md).

Reasoning is free, and so are line breaks after it. A forced call begins the answer. Otherwise the text is free until
a call begins, and bound from there on: to a name, to arguments by its schema, and to another call or the end. Special
tokens in a format are named by id, because text never matches them; text that only spells them is a call too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from jobs.errors import UnsupportedParameter
from jobs.grammar.compiler import json_grammar
from jobs.messages import FunctionTool, ReasoningFormat, Tools
from jobs.openai.call_formats import CallFormat
from worker.engine.grammar.grammar import Grammar

_ANY: Final = "TEXT: /(?s:.*)/"
_BREAKS: Final = "BREAKS: /[\\r\\n]+/"


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """Writes the grammars of one model's answers."""

    form: CallFormat
    added_tokens: Mapping[str, int]  # tokens that the tokenizer reads as one, in any text
    parallel: bool = True  # the family can write several calls in one answer

    def grammar(self, tools: Tools, reasoning: ReasoningFormat | None, content: str | None = None) -> Grammar:
        """Return the grammar of an answer; `tools` has a function that the model may call.

        `content` is the grammar of an answer without calls, None if it is free. Raises UnsupportedParameter if a call
        can't be told from it.
        """
        closing = None if reasoning is None or not reasoning.opened else self.added_tokens.get(reasoning.end)
        bound = content is not None and not tools.forced
        if bound and self.form.at_start:
            raise UnsupportedParameter(
                "Calls of this model begin like JSON, so its answer can't be one or the other; set tool_choice to none "
                "or required.",
                param="response_format",
            )
        text = self.text(tools, reasoning, thought=closing is not None, bound=bound)
        grammars = [{"name": "answer", "lark_grammar": text}]
        if content is not None and bound:
            grammars.append({**_single(content), "name": "content"})
        return Grammar(json.dumps({"grammars": grammars}), () if closing is None else (closing,))

    def text(
        self, tools: Tools, reasoning: ReasoningFormat | None = None, *, thought: bool = False, bound: bool = False
    ) -> str:
        """Return the grammar in Lark's syntax. Reasoning, which is free, may come first unless it is `thought`.

        If the content is `bound`, an answer without calls is of the grammar that is named content.
        """
        free = not tools.forced and not bound
        answer = "first calls" if tools.forced else "@content | first calls" if bound else "TEXT | opening calls"
        lines = [f"first: {self._spelt(self.form.first)}", *self._calls(tools)]
        if reasoning is None:
            lines.append(f"start: {answer}")
        elif thought:
            lines.append(f"start: BREAKS? ({answer})")
        elif reasoning.opened:
            lines.append(f"start: thought BREAKS? ({answer})" + (" | TEXT" if free else ""))
        else:
            lines.append(f"start: ({self._spelt(reasoning.start)} thought)? BREAKS? ({answer})")
        if free:
            lines += self._openings()
        if reasoning is not None and not thought:
            lines.append(self._thought(reasoning.end))
        return "\n".join([*lines, _ANY, _BREAKS, ""])

    def _thought(self, end: str) -> str:
        """Return the rule of a text up to and with the end of the reasoning."""
        if end in self.added_tokens:
            return f"thought: TEXT {self._spelt(end)}"
        return f"thought[lazy]: TEXT {_quoted(end)}"

    def _calls(self, tools: Tools) -> Iterator[str]:
        form, functions = self.form, tools.callable
        several = self.parallel and tools.parallel and tools.choice != "named" and form.next is not None
        following = f" ({self._spelt(form.next or '')} call)*" if several else ""
        yield f"calls: call{following} {self._spelt(form.last)}"
        yield "call: " + " | ".join(f"call_{n}" for n in range(len(functions)))
        for n, function in enumerate(functions):
            head = self._spelt(function.name + form.arguments)
            yield f"call_{n}: {head} arguments_{n} {self._spelt(form.after)}"
            yield f"arguments_{n}: %json {_arguments_grammar(function)}"

    def _openings(self) -> Iterator[str]:
        """Yield the rules of a text up to and with the start of the first call."""
        form = self.form
        rest = self._spelt(form.first.removeprefix(form.trigger))
        ways = [f"spelt {rest}"]
        before = "/[ \\n\\t]*/" if form.at_start else "TEXT"
        if form.trigger in self.added_tokens:
            ways.append(f"{before} <[{self.added_tokens[form.trigger]}]> {rest}")
        if form.opening in self.added_tokens:
            ways.append(f"<[{self.added_tokens[form.opening]}]> {self._spelt(form.first)}")
        yield "opening: " + " | ".join(ways)
        yield f"spelt[lazy]: {before} {_quoted(form.trigger)}"

    def _spelt(self, text: str) -> str:
        """Return a fixed text: strings, and the ids of the special tokens in it."""
        tokens = sorted((token for token in self.added_tokens if token and token in text), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]
        return " ".join(
            f"<[{self.added_tokens[part]}]>" if part in self.added_tokens else _quoted(part) for part in parts if part
        )


def after_reasoning(content: str, reasoning: ReasoningFormat, *, thought: bool) -> str:
    """Return the grammar of a content after opened reasoning, which the text holds unless it is `thought`.

    The reasoning ends with the first end marker, in any tokens that spell it.
    """
    lines = ["start: BREAKS? @content" if thought else "start: thought BREAKS? @content"]
    if not thought:
        lines += [f"thought[lazy]: TEXT {_quoted(reasoning.end)}", _ANY]
    answer = {"name": "answer", "lark_grammar": "\n".join([*lines, _BREAKS, ""])}
    return json.dumps({"grammars": [answer, {**_single(content), "name": "content"}]})


def _arguments_grammar(function: FunctionTool) -> str:
    """Return the schema of a function's arguments as llguidance takes it, with the blanks that templates print."""
    schema = json_grammar(function.arguments_schema, whitespace="")
    schema["x-guidance"] = {**schema["x-guidance"], "item_separator": ", ", "key_separator": ": "}
    return json.dumps(schema, ensure_ascii=False)


def _single(content: str) -> dict[str, str]:
    """Return the one grammar of a text that llguidance takes: its own JSON, or Lark."""
    if not content.startswith("{"):
        return {"lark_grammar": content}
    (grammar,) = json.loads(content)["grammars"]
    return dict(grammar)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
