"""Generate the text of one prompt in this process, without servers.

Used by `basic generate` and the `generate_with_*` functions; worker processes run the same engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from jobs.messages import CHAT_ENDPOINT, GenerationRequest, GrammarSpec, SamplingParameters
from jobs.openai.logprobs import TokenAlternatives, logprobs_object
from worker.engine.options import Mode
from worker.engine.stats import StepStats
from worker.loading.loader import LoadedModel, load_engine
from worker.settings import WorkerSettings
from worker.text.output_stream import OutputStream
from worker.text.stop_strings import Pieces


@dataclass(frozen=True, slots=True)
class Generation:
    """Result of one prompt."""

    text: str
    token_ids: tuple[int, ...]  # includes the end-of-sequence token, if sampled
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    steps: tuple[StepStats, ...]
    logprobs: tuple[TokenAlternatives, ...] | None  # per token, if requested
    endpoint: str

    def as_json(self) -> dict[str, Any]:
        """Return the public JSON form; steps have the columns of the table `decode_steps`."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "prompt_token_ids": list(self.prompt_token_ids),
            "prompt_tokens": len(self.prompt_token_ids),
            "completion_tokens": len(self.token_ids),
            "finish_reason": self.finish_reason,
            "logprobs": self._logprobs(),
            "steps": [asdict(numbers) for numbers in self.steps],
        }

    def _logprobs(self) -> dict[str, Any] | None:
        """Return the log-probabilities in the format of the endpoint."""
        stored = None if self.logprobs is None else [likelihoods.stored() for likelihoods in self.logprobs]
        return logprobs_object(self.endpoint, stored, self.text)


def generate(
    loaded: LoadedModel,
    request: GenerationRequest,
    *,
    endpoint: str = CHAT_ENDPOINT,
    mode: Mode | None = None,
    on_pieces: Callable[[Pieces], None] = lambda _: None,
) -> Generation:
    """Decode one choice of a request; call `on_pieces` with the new text of each step. Raises RequestRefused."""
    engine = loaded.engine(replace(loaded.options, mode=mode) if mode else None)
    prompt = loaded.codec.encode(request, endpoint)
    form = loaded.codec.answer_format(request, endpoint, prompt)
    grammar = loaded.codec.grammar(request, form)
    sequence = loaded.codec.sequence((0,), prompt, request.sampling, choice=0, grammar=grammar)
    stream = loaded.codec.stream(request.sampling, prompt, endpoint, form, grammar)
    output_stream = OutputStream(sequence.key, stream)
    steps: list[StepStats] = []
    logprobs: list[TokenAlternatives] = []
    engine.add(sequence)
    while engine.busy:
        for result in engine.step():
            written = output_stream.take(result)
            steps.append(written.stats)
            logprobs += written.logprobs or ()
            on_pieces(written.pieces)
        if output_stream.finished:
            engine.cancel({sequence.key})  # ended by a stop string, which the engine does not know
    assert output_stream.finish_reason is not None
    return Generation(
        text=output_stream.text,
        token_ids=tuple(output_stream.token_ids),
        prompt_token_ids=tuple(prompt),
        finish_reason=output_stream.finish_reason,
        steps=tuple(steps),
        logprobs=None if request.sampling.logprobs is None else tuple(logprobs),
        endpoint=endpoint,
    )


def request_for(
    model: str,
    prompt: str,
    *,
    max_tokens: int | None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    grammar: GrammarSpec | None = None,
) -> GenerationRequest:
    """Return a request of one prompt. Raises ValueError for values out of range."""
    if max_tokens == 0:  # valid only of requests that ask for something of the prompt
        raise ValueError("max_tokens must be at least 1, not 0")
    sampling = SamplingParameters(
        max_tokens=max_tokens, temperature=temperature, seed=seed, stop=tuple(stop), logprobs=logprobs
    )
    return GenerationRequest(model=model, prompt=prompt, sampling=sampling, grammar=grammar)


@lru_cache(maxsize=1)
def resident_model(settings: WorkerSettings) -> LoadedModel:
    """Return the models of these settings, loaded once per process."""
    return load_engine(settings)
