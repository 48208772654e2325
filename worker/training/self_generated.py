"""Generate the training texts: the target writes questions and answers them, with the engine that serves jobs.

This needs no data set and no hub access. Prompts from a file can replace the questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jobs.errors import InvalidValue
from jobs.messages import CHAT_ENDPOINT
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sequence import Sequence as EngineSequence
from worker.generate import request_for
from worker.loading.loader import LoadedModel
from worker.training.config import Recipe

OnTokens = Callable[[int], None]  # takes the number of tokens written since the last call

_ROUND = 256  # texts generated and saved together; an interruption loses one round at most
_MAX_EMPTY_ROUNDS = 4  # rounds in a row without a text before generation fails
_QUESTION_TOKENS = 96  # maximum of a question; longer ones are dropped
_QUESTION_TOP_P = 0.95  # tokens from the tail of the distribution rarely make questions
_PLACEHOLDER = "basic-question"  # marks the question in a rendered chat template


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and the target's answer."""

    ids: tuple[int, ...]
    num_prompt: int
    greedy: bool

    @property
    def written(self) -> int:
        """Number of tokens of the answer."""
        return len(self.ids) - self.num_prompt


def write(
    loaded: LoadedModel,
    recipe: Recipe,
    file: Path,
    prompts: Sequence[str] = (),
    on_tokens: OnTokens = lambda _: None,
) -> list[Text]:
    """Generate answers until they have `recipe.tokens` tokens; return all texts.

    Texts in `file` count, so an interrupted run resumes. Raises InvalidValue if there are no `prompts` and the target
    has no chat template to write questions in, or if no prompt leaves enough context for an answer.
    """
    texts = read(file) if file.exists() else []
    _write(file, texts, "w")  # drops a truncated last line
    written = sum(text.written for text in texts)
    on_tokens(written)
    given = _fitting(loaded, recipe, [_encode(loaded, prompt) for prompt in prompts])
    empty_rounds = 0
    while written < recipe.tokens:
        first = len(texts)
        asked = _next_prompts(given, first) if given else _questions(loaded, recipe, first)
        answers = _answers(loaded, recipe, asked, first, on_tokens)
        empty_rounds = 0 if answers else empty_rounds + 1
        if empty_rounds == _MAX_EMPTY_ROUNDS:
            raise InvalidValue(
                f"the target wrote no question that leaves {recipe.answer_tokens} tokens for an answer in a context of "
                f"{loaded.options.max_context}; pass --prompts, or raise BASIC_MAX_CONTEXT",
                param="--prompts",
            )
        _write(file, answers, "a")
        texts += answers
        written += sum(text.written for text in answers)
    return texts


def complete(file: Path, recipe: Recipe) -> bool:
    """Return whether the file has all the tokens that the recipe asks for."""
    return file.exists() and sum(text.written for text in read(file)) >= recipe.tokens


def read(file: Path) -> list[Text]:
    """Return the texts of a file, without a truncated last line."""
    lines = file.read_text().split("\n")[:-1]
    return [Text(tuple(row["ids"]), row["num_prompt"], row["greedy"]) for row in map(json.loads, lines)]


def _write(file: Path, texts: Sequence[Text], mode: str) -> None:
    with file.open(mode) as out:
        out.write("".join(json.dumps(asdict(text)) + "\n" for text in texts))


def _fitting(loaded: LoadedModel, recipe: Recipe, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the prompts that leave context for an answer; raises InvalidValue if there are prompts but none does."""
    max_prompt = loaded.options.max_context - recipe.answer_tokens
    fitting = [ids for ids in prompts if len(ids) <= max_prompt]
    if prompts and not fitting:
        raise InvalidValue(
            f"no prompt leaves {recipe.answer_tokens} tokens for an answer in a context of "
            f"{loaded.options.max_context}: the shortest has {min(map(len, prompts))} tokens; shorten the "
            "prompts, or raise BASIC_MAX_CONTEXT",
            param="--prompts",
        )
    return fitting


def _next_prompts(prompts: Sequence[list[int]], first: int) -> list[list[int]]:
    """Return the next prompts, `_ROUND` or all of them if they are fewer; start over after the last."""
    return [prompts[index % len(prompts)] for index in range(first, first + min(_ROUND, len(prompts)))]


def _questions(loaded: LoadedModel, recipe: Recipe, first: int) -> list[list[int]]:
    """Return chat prompts with questions that the target writes in the user's turn."""
    before, after = _template(loaded)
    sampling = Sampling(temperature=1.0, top_p=_QUESTION_TOP_P)
    samplings = [replace(sampling, key=noise_key(~recipe.seed, first + n)) for n in range(_ROUND)]
    asked = _decode(loaded, [before] * _ROUND, samplings, _QUESTION_TOKENS)
    ended = [question for question in asked if len(question) > 1 and question[-1] in loaded.codec.eos_ids]
    return [[*before, *question[:-1], *after] for question in ended]


def _template(loaded: LoadedModel) -> tuple[list[int], list[int]]:
    """Return the token ids of the chat template before and after a question."""
    ids, placeholder = (
        _encode(loaded, _PLACEHOLDER),
        loaded.codec.tokenizer.encode(_PLACEHOLDER, add_special_tokens=False),
    )
    for start in range(len(ids) - len(placeholder) + 1):
        if ids[start : start + len(placeholder)] == placeholder:
            return ids[:start], ids[start + len(placeholder) :]
    raise InvalidValue("the target has no chat template to write questions in; pass --prompts", param="--prompts")


def _encode(loaded: LoadedModel, prompt: str) -> list[int]:
    return loaded.codec.encode(request_for(loaded.name, prompt, max_tokens=None), CHAT_ENDPOINT)


def _answers(
    loaded: LoadedModel, recipe: Recipe, asked: Sequence[list[int]], first: int, on_tokens: OnTokens
) -> list[Text]:
    asked = [ids for ids in asked if len(ids) + recipe.answer_tokens <= loaded.options.max_context]
    # Interleave greedy and sampled answers, so that every part of the file, held-out texts included, has both.
    samplings = [
        Sampling()
        if (first + n) % 10 < 10 * recipe.greedy_share
        else Sampling(1.0, key=noise_key(recipe.seed, first + n))
        for n in range(len(asked))
    ]
    answers = _decode(loaded, asked, samplings, recipe.answer_tokens, on_tokens)
    return [
        Text((*prompt, *answer), len(prompt), sampling.greedy)
        for prompt, answer, sampling in zip(asked, answers, samplings, strict=True)
    ]


def _decode(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
    max_tokens: int,
    on_tokens: OnTokens = lambda _: None,
) -> list[list[int]]:
    """Return the tokens that the target writes after each prompt, with the end token."""
    engine = loaded.engine(replace(loaded.options, mode=Mode.PLAIN))
    sequences = [
        EngineSequence(index, list(ids), len(ids), max_tokens, sampling, loaded.codec.eos_ids)
        for index, (ids, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.busy:
        on_tokens(len(engine.step().tokens))
    return [sequence.output_ids for sequence in sequences]
