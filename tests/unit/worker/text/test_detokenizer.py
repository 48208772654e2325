"""The detokenizer: no ids raise, no byte is lost, and a completion continues its prompt."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, SamplingParameters
from tests.models import byte_tokenizer
from worker.engine.token_logprobs import TokenLogprobs
from worker.text.codec import Codec
from worker.text.detokenizer import Detokenizer
from worker.text.text_stream import TextStream
from worker.text.token_bytes import token_bytes

WORDS = ["▁", "▁Hello", "▁world", "a", "!", "»", "▁日", "<eos>"]
BYTE = len(WORDS)  # the id of byte 0


def sentencepiece(strip: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer that spells unknown characters byte by byte, and may strip a text's first space."""
    vocab = {word: i for i, word in enumerate(WORDS)} | {f"<0x{byte:02X}>": BYTE + byte for byte in range(256)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")  # type: ignore[no-untyped-call]
    tokenizer.chat_template = "{{ messages[0].content }}" if chat else None
    return tokenizer


def some_bytes(*values: int) -> list[int]:
    return [BYTE + value for value in values]


def streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int], before: list[int] | None) -> str:
    detokenizer = Detokenizer(tokenizer, before)
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


def joined(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    return b"".join(bytes(token_bytes(tokenizer).text_and_bytes(token)[1] or ()) for token in ids)


@pytest.mark.parametrize("strip", [False, True])
def test_invalid_bytes_raise_no_error_and_are_not_lost(strip: bool) -> None:
    tokenizer = sentencepiece(strip)
    ids = [WORDS.index("▁Hello"), *some_bytes(0xC2, 0xA0, 0xC2), WORDS.index("»")]
    assert streamed(tokenizer, ids, []) == " Hello\u00a0\ufffd»"
    ids = [*some_bytes(0xC2, 0xE6, 0x97, 0xA5), WORDS.index("!")]
    assert streamed(tokenizer, ids, []) == "\ufffd日!", "a broken byte takes no whole character with it"


@pytest.mark.parametrize("tokenizer", [sentencepiece(), sentencepiece(strip=False), byte_tokenizer()])
def test_any_ids_decode_to_the_text_of_their_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    lots = random.Random(7)
    for _ in range(300):
        runs = [lots.choice(["日本", "é", "a", " b", "🙂"]).encode() for _ in range(6)]
        cut = [run[: lots.randint(1, len(run))] if lots.random() < 0.3 else run for run in runs]
        own = 0 if len(tokenizer) == 258 else BYTE
        ids = [own + byte for byte in b"".join(cut)]
        assert streamed(tokenizer, ids, []) == joined(tokenizer, ids).decode(errors="replace")
    for _ in range(300):
        ids = [lots.randrange(len(tokenizer) + 3) for _ in range(30)]
        known = [token for token in ids if token < len(tokenizer)]
        assert streamed(tokenizer, ids, []) == joined(tokenizer, known).decode(errors="replace")


def test_text_is_held_back_no_longer_than_a_character_may_take() -> None:
    detokenizer = Detokenizer(sentencepiece(), [])
    texts = [detokenizer.push(token) for token in some_bytes(*[0xA0] * 200)]
    assert len("".join(texts)) >= 180


@pytest.mark.parametrize("tokenizer", [sentencepiece(), sentencepiece(strip=False), byte_tokenizer()])
@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_that_are_kept_stand_where_the_tokenizer_decodes_them(
    tokenizer: PreTrainedTokenizerFast, chat: bool
) -> None:
    lots = random.Random(11)
    codec = Codec(tokenizer, frozenset(), 100, len(tokenizer))
    sampling = SamplingParameters(seed=0, skip_special_tokens=False)
    space = tokenizer.get_vocab().get("<0x20>")  # no tokenizer spells a space as a byte
    letters = [token for token in range(len(tokenizer)) if str(tokenizer.decode([token])).isascii() and token != space]
    for _ in range(100):
        ids = [lots.choice([lots.choice(letters), tokenizer.eos_token_id]) for _ in range(12)]
        stream = TextStream(codec.tokenizer, sampling, None if chat else ())
        said, own = spell_out(stream, ids)
        wanted = codec.decode(ids, skip_special_tokens=False)
        assert said.lstrip(" ") == wanted.lstrip(" ")
        assert said == wanted or not chat
        assert said == own.decode()


@pytest.mark.parametrize("prompt", [["▁Hello"], ["<eos>"], [], ["▁Hello", "<eos>"]])
def test_a_completion_keeps_the_space_with_which_it_continues_its_prompt(prompt: list[str]) -> None:
    codec = Codec(sentencepiece(), frozenset({WORDS.index("<eos>")}), 100, len(WORDS) + 256)
    stream = codec.stream(None, [WORDS.index(word) for word in prompt], COMPLETIONS_ENDPOINT)
    assert spell_out(stream, [WORDS.index("▁world"), WORDS.index("!")]) == (" world!", b" world!")


def test_a_prompt_that_ends_within_a_character_leaves_the_completion_its_own_bytes() -> None:
    codec = Codec(sentencepiece(), frozenset(), 100, len(WORDS) + 256)
    stream = codec.stream(None, [WORDS.index("a"), *some_bytes(0xE6)], COMPLETIONS_ENDPOINT)
    assert spell_out(stream, [*some_bytes(0xC3, 0xA9), WORDS.index("▁world")])[0] == "é world"


@pytest.mark.parametrize("ids", [["▁world", "!"], ["<eos>", "▁world", "!"], ["▁", "▁world"]])
def test_an_answer_begins_without_a_space_and_its_bytes_are_its_text(ids: list[str]) -> None:
    codec = Codec(sentencepiece(chat=True), frozenset(), 100, len(WORDS) + 256)
    tokens = [WORDS.index(word) for word in ids]
    said, own = spell_out(codec.stream(None, [0, 1], CHAT_ENDPOINT), tokens)
    assert said == own.decode() == codec.decode(tokens)
    resumed = codec.stream(None, [0, 1], CHAT_ENDPOINT)
    resumed.resume(tokens[:-1], [False] * (len(tokens) - 1))
    assert spell_out(resumed, tokens[-1:]) == (said, joined(codec.tokenizer, tokens[-1:]))


def spell_out(stream: TextStream, ids: list[int]) -> tuple[str, bytes]:
    """Push tokens; return the text, and the joined bytes of the tokens' logprobs."""
    stream.push(ids, [False] * len(ids))
    logprobs = stream.readable_logprobs(ids, [TokenLogprobs(-1.0, ())] * len(ids))
    stream.finish()
    return stream.text, b"".join(bytes(t.chosen.bytes or ()) for t in logprobs)
