"""The chat page: talk to a model and see which tokens the draft foresaw.

An answer is an interactive request, as `/v1/chat/completions` makes one, with priority over batches.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any, Final

from nicegui import ui

from jobs.api.auth.caller import Caller
from jobs.api.calls import call_output, follow_call
from jobs.api.write_threads import run_write
from jobs.dashboard import format, html
from jobs.dashboard.layout import box, frame, heading, legend
from jobs.dashboard.session import PageContext
from jobs.errors import BasicError
from jobs.keys import Scope
from jobs.messages import CHAT_ENDPOINT, PartialEvent
from jobs.openai.answers import split_answer
from jobs.openai.completions import answer_format
from jobs.submission.intake import Submission, create_interactive_job, new_call_id
from jobs.submission.items import Item
from jobs.submission.models import known_models

_MESSAGE_CHARS: Final = 100_000  # a socket message has it as escaped JSON
_TOKENS: Final = 512
_REDRAW_S: Final = 0.1  # at most this often; each sends the whole text
_TO_THE_END: Final = "window.scrollTo(0, document.body.scrollHeight)"
_EMPTY: Final = "Write a message to start. Green tokens were proposed by the draft and accepted by the target."

Message = dict[str, str]


async def build(context: PageContext, caller: Caller) -> None:
    """Build the page."""
    known = await asyncio.to_thread(known_models, context.services.database, context.services.settings)
    with frame("Chat", context):
        heading("Chat", 1)
        chat = ChatPage(context, known.names)
        ui.context.client.on_delete(chat.stop)


class ChatPage:
    """One conversation. It is in the memory of this page: a reload starts another."""

    def __init__(self, context: PageContext, models: list[str]) -> None:
        """Add the settings, an empty conversation and the input."""
        self._context = context
        self._history: list[Message] = []
        self._answering: asyncio.Task[Any] | None = None
        self._lay_out_settings(models)
        legend()
        self._empty = ui.label(_EMPTY).classes("dim")
        self._turns = ui.element("div").props('role="log" aria-label="Conversation"').classes("stack chat")
        with ui.element("div").classes("line chat-input"):
            self._input = ui.textarea("Message").classes("grow")
            self._input.props(f"outlined autogrow autofocus maxlength={_MESSAGE_CHARS}")
            self._input.on("keydown.enter.exact.prevent", self._send)
            self._send_button = ui.button("Send", on_click=self._send).props("no-caps")
            self._stop_button = ui.button("Stop", on_click=self.stop).props("outline no-caps")
        ui.label("Enter sends; Shift and Enter starts a line.").classes("dim small")
        self._show_state()

    def _lay_out_settings(self, models: list[str]) -> None:
        target = self._context.services.settings.default_model
        with ui.element("div").classes("line"):
            self._model = ui.select(models, value=target, label="Model").props("outlined dense").classes("grow")
            self._tokens = ui.number("Max tokens", value=_TOKENS, min=1, precision=0)
            self._heat = ui.number("Temperature", value=0, min=0, max=2, step=0.1)
            for number in (self._tokens, self._heat):
                number.props("outlined dense").style("width:8rem")
            ui.button("New chat", on_click=self._clear).props("flat no-caps")

    def stop(self) -> None:
        """Cancel the answer that is being written."""
        if self._answering is not None:
            self._answering.cancel()

    def _clear(self) -> None:
        self.stop()
        self._history.clear()
        self._turns.clear()
        self._show_state()

    def _show_state(self) -> None:
        answering = self._answering is not None
        self._send_button.set_visibility(not answering)
        self._stop_button.set_visibility(answering)
        self._empty.set_visibility(not self._history and not answering)

    async def _send(self) -> None:
        text = (self._input.value or "").strip()
        if not text or self._answering is not None:
            return
        self._input.value = ""
        asked = [*self._history, {"role": "user", "content": text}]
        with self._turns, box():
            ui.label("You").classes("dim small")
            ui.html(f"<bdi class='model-text'>{html.plain(text)}</bdi>", sanitize=False)
        with self._turns:
            answer = AnswerBox()
        self._answering = asyncio.current_task()
        self._show_state()
        ui.run_javascript(_TO_THE_END)
        try:
            self._history = [*asked, {"role": "assistant", "content": await self._answer(asked, answer)}]
        except BasicError as refused:
            answer.fail(str(refused))
        except asyncio.CancelledError:
            answer.fail("Stopped.")
            self._history = [*asked, {"role": "assistant", "content": answer.text}]
        finally:
            self._answering = None
            self._show_state()

    async def _answer(self, asked: list[Message], answer: AnswerBox) -> str:
        """Follow the answer to these messages and return its content, without reasoning."""
        services = self._context.services
        job_id = await run_write(
            create_interactive_job,
            await self._submission(asked),
            database=services.database,
            notify=services.notify,
            settings=services.settings,
        )
        async with aclosing(follow_call(services, job_id)) as events:
            async for event in events:
                answer.add(event)
        output = await asyncio.to_thread(call_output, services, job_id)
        answer.finish()
        return split_answer(answer_format(output), output.choices[0].text).content or ""

    async def _submission(self, asked: list[Message]) -> Submission:
        caller = await self._context.authenticate(Scope.SUBMIT)
        fields = {
            "model": str(self._model.value),
            "messages": asked,
            "max_tokens": int(self._tokens.value or 1),
            "temperature": float(self._heat.value or 0),
        }
        return Submission(
            [Item(0, fields)],
            endpoint=CHAT_ENDPOINT,
            window_s=self._context.services.settings.interactive_timeout_s,
            job_id=new_call_id(CHAT_ENDPOINT),
            api_key_id=caller.key_id,
        )


class AnswerBox:
    """An answer while it is written: its text by source, its tokens and speed."""

    def __init__(self) -> None:
        """Add an empty box."""
        self._pieces: list[tuple[str, str]] = []
        self._tokens = self._accepted = 0
        self._began_at = self._drawn_at = time.monotonic()
        with box():
            ui.label("Model").classes("dim small")
            self._shown = ui.html("", sanitize=False)
            self._about = ui.label("Waiting for the model …").classes("dim small").props('role="status"')

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(text for text, _ in self._pieces)

    def add(self, event: PartialEvent) -> None:
        """Add the text of an event, and draw it unless that was done just now."""
        if event.type != "tokens":
            return
        if event.snapshot:
            self._pieces.clear()
            self._tokens = self._accepted = 0
        self._pieces += [(piece.text, piece.source) for piece in event.pieces]
        self._tokens += event.tokens
        self._accepted += event.accepted
        if time.monotonic() - self._drawn_at > _REDRAW_S:
            self._draw()

    def finish(self) -> None:
        """Draw the whole answer."""
        self._draw()

    def fail(self, why: str) -> None:
        """Draw what there is, and why there is no more."""
        self._draw()
        self._about.set_text(html.safe(why))

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        self._shown.set_content(html.colored(self._pieces))
        rate = format.number(self._tokens / max(self._drawn_at - self._began_at, 1e-3))
        share = format.percent(self._accepted / self._tokens if self._tokens else None)
        self._about.set_text(f"{self._tokens:,d} tokens, {share} from the draft · {rate} tokens/s")
