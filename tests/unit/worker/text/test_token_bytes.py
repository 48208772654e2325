"""Texts and bytes of single tokens: the joined bytes are the bytes of the text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.models import byte_tokenizer
from worker.text.token_bytes import TokenBytes


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that spells spaces as ▁ and unknown characters byte by byte, as Llama's does."""
    vocab = {"▁Hello": 0, "▁you": 1, "!": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")  # type: ignore[no-untyped-call]


def joined(token_bytes: TokenBytes, ids: list[int]) -> bytes:
    return b"".join(bytes(token_bytes.text_and_bytes(token)[1] or ()) for token in ids)


@pytest.mark.parametrize("text", ["plain", "zwölf Bücher\n", "日本語 🙂 end", "nul \0"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert joined(TokenBytes(tokenizer), [*ids, 256]).decode() == text


def test_a_token_that_is_part_of_a_character_has_bytes_and_a_replacement() -> None:
    assert TokenBytes(byte_tokenizer()).text_and_bytes(0xE2) == ("\ufffd", (0xE2,))
    assert TokenBytes(sentencepiece_tokenizer()).text_and_bytes(3 + 0xE2) == ("\ufffd", (0xE2,))


def test_special_tokens_and_rows_without_a_token_have_names_and_no_bytes() -> None:
    assert TokenBytes(byte_tokenizer()).text_and_bytes(256) == ("<eos>", None)
    assert TokenBytes(byte_tokenizer()).text_and_bytes(1000) == ("<1000>", None)


def test_token_texts_contain_no_nul_because_postgresql_rejects_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["a\0b"])
    assert TokenBytes(tokenizer).text_and_bytes(258) == ("a\ufffdb", (97, 0, 98))
    assert TokenBytes(tokenizer).text_and_bytes(0) == ("\ufffd", (0,))


def test_a_leading_space_of_a_token_is_kept_at_the_start_of_a_text() -> None:
    token_bytes = TokenBytes(sentencepiece_tokenizer())
    assert [token_bytes.text_and_bytes(token)[0] for token in (0, 1, 2)] == [" Hello", " you", "!"]
    assert joined(token_bytes, [0, 1, 2]) == b" Hello you!"
