"""The texts of a training: the target asks itself questions and answers them, through the engine that serves jobs.

Needs no data set and no hub; prompts of a file may take the questions' place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jobs.errors import InvalidValue
from jobs.messages import CHAT_ENDPOINT
from worker.engine.options import Mode
from worker.engine.sampling.sampling import Sampling, noise_key
from worker.engine.sequence import Sequence as EngineSequence
from worker.generate import request_for
from worker.loading.loader import LoadedModel
from worker.training.config import Recipe

Progress = Callable[[int], None]  # takes the tokens written since the last call

_ROUND = 256  # texts that are written together, and kept together when the training is interrupted
_BARREN = 4  # rounds in a row without a text, after which there will be none
_QUESTION_TOKENS = 96  # of a question at most; one that has not ended by then is thrown away
_QUESTION_TOP_P = 0.95  # the tail of the target's law makes no questions
_PLACE = "basic-question"  # stands in the chat template where the question goes


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what the target wrote behind it."""

    ids: tuple[int, ...]
    num_prompt: int
    greedy: bool

    @property
    def written(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.num_prompt


def write(
    loaded: LoadedModel,
    recipe: Recipe,
    file: Path,
    prompts: Sequence[str] = (),
    progress: Progress = lambda _: None,
) -> list[Text]:
    """Let the target write until it has written `recipe.tokens`; return all texts.

    What lies in `file` is taken as written, so an interrupted training goes on where it stopped. Raises InvalidValue if
    the target's chat template has no place for a question and there are no `prompts`.
    """
    texts = read(file) if file.exists() else []
    _write(file, texts, "w")  # without a line that was cut off
    written = sum(text.written for text in texts)
    progress(written)
    given = _fitting(loaded, recipe, [_encode(loaded, prompt) for prompt in prompts])
    barren = 0
    while written < recipe.tokens:
        first = len(texts)
        asked = _given(given, first) if given else _questions(loaded, recipe, first)
        answers = _answers(loaded, recipe, asked, first, progress)
        barren = 0 if answers else barren + 1
        if barren == _BARREN:
            raise InvalidValue(
                f"the target asked itself nothing that {recipe.answer_tokens} tokens can answer in a context of "
                f"{loaded.options.max_context}; give prompts, or raise BASIC_MAX_CONTEXT",
                param="--prompts",
            )
        _write(file, answers, "a")
        texts += answers
        written += sum(text.written for text in answers)
    return texts


def complete(file: Path, recipe: Recipe) -> bool:
    """Return whether everything that the recipe wants is written."""
    return file.exists() and sum(text.written for text in read(file)) >= recipe.tokens


def read(file: Path) -> list[Text]:
    """Return the texts of a file; a last line that was cut off is no text."""
    lines = file.read_text().split("\n")[:-1]
    return [Text(tuple(said["ids"]), said["num_prompt"], said["greedy"]) for said in map(json.loads, lines)]


def _write(file: Path, texts: Sequence[Text], how: str) -> None:
    with file.open(how) as out:
        out.write("".join(json.dumps(asdict(text)) + "\n" for text in texts))


def _fitting(loaded: LoadedModel, recipe: Recipe, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the prompts that leave room for an answer; raises InvalidValue if there are some, and none does."""
    room = loaded.options.max_context - recipe.answer_tokens
    fitting = [ids for ids in prompts if len(ids) <= room]
    if prompts and not fitting:
        raise InvalidValue(
            f"no prompt leaves room for an answer of {recipe.answer_tokens} tokens in a context of "
            f"{loaded.options.max_context}: the shortest has {min(map(len, prompts))} tokens; give shorter ones, or "
            "raise BASIC_MAX_CONTEXT",
            param="--prompts",
        )
    return fitting


def _given(prompts: Sequence[list[int]], first: int) -> list[list[int]]:
    """Return the next of these prompts, which start over when they are used up."""
    return [prompts[number % len(prompts)] for number in range(first, first + _ROUND)]


def _questions(loaded: LoadedModel, recipe: Recipe, first: int) -> list[list[int]]:
    """Return prompts with questions of the target's own: what it writes where a user would."""
    before, after = _template(loaded)
    law = Sampling(temperature=1.0, top_p=_QUESTION_TOP_P)
    laws = [replace(law, key=noise_key(~recipe.seed, first + n)) for n in range(_ROUND)]
    asked = _decode(loaded, [before] * _ROUND, laws, _QUESTION_TOKENS)
    ended = [question for question in asked if len(question) > 1 and question[-1] in loaded.codec.eos_ids]
    return [[*before, *question[:-1], *after] for question in ended]


def _template(loaded: LoadedModel) -> tuple[list[int], list[int]]:
    """Return the chat template's ids before and behind a question."""
    ids, place = _encode(loaded, _PLACE), loaded.codec.tokenizer.encode(_PLACE, add_special_tokens=False)
    for start in range(len(ids) - len(place) + 1):
        if ids[start : start + len(place)] == place:
            return ids[:start], ids[start + len(place) :]
    raise InvalidValue("the target has no chat template to ask itself questions in; give prompts", param="--prompts")


def _encode(loaded: LoadedModel, prompt: str) -> list[int]:
    return loaded.codec.encode(request_for(loaded.name, prompt, max_tokens=None), CHAT_ENDPOINT)


def _answers(
    loaded: LoadedModel, recipe: Recipe, asked: Sequence[list[int]], first: int, progress: Progress
) -> list[Text]:
    asked = [ids for ids in asked if len(ids) + recipe.answer_tokens <= loaded.options.max_context]
    # Greedy and sampled answers in turns: both kinds stand in every part of the file.
    laws = [
        Sampling()
        if (first + n) % 10 < 10 * recipe.greedy_share
        else Sampling(1.0, key=noise_key(recipe.seed, first + n))
        for n in range(len(asked))
    ]
    answers = _decode(loaded, asked, laws, recipe.answer_tokens, progress)
    return [
        Text((*prompt, *answer), len(prompt), law.greedy)
        for prompt, answer, law in zip(asked, answers, laws, strict=True)
    ]


def _decode(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    laws: Sequence[Sampling],
    max_tokens: int,
    progress: Progress = lambda _: None,
) -> list[list[int]]:
    """Return what the target writes behind each prompt, the token that ended it included."""
    engine = loaded.engine(replace(loaded.options, mode=Mode.PLAIN))
    sequences = [
        EngineSequence(number, list(ids), len(ids), max_tokens, law, loaded.codec.eos_ids)
        for number, (ids, law) in enumerate(zip(prompts, laws, strict=True))
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.busy:
        progress(sum(len(result.tokens) for result in engine.step()))
    return [sequence.output_ids for sequence in sequences]
