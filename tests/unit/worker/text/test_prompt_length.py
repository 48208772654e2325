"""The lower bound of a prompt's token count is never too high, and prompts that can't fit are not tokenized."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import AddedToken, PreTrainedTokenizerFast

from jobs.errors import PromptTooLong
from jobs.messages import COMPLETIONS_ENDPOINT, GenerationRequest, SamplingParameters
from tests.models import byte_tokenizer
from tests.unit.worker.text.test_detokenizer import sentencepiece
from worker.text.codec import Codec
from worker.text.prompt_length import PromptLength


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), sentencepiece()])
def test_the_bound_never_exceeds_the_token_count(tokenizer: PreTrainedTokenizerFast) -> None:
    lots, length = random.Random(5), PromptLength(tokenizer)
    found = 0
    for _ in range(300):
        text = "".join(lots.choice(["Hello", " world", "日本", "e\u0301", "<eos>", "  ", "\n"]) for _ in range(20))
        least = length.min_tokens(text)
        assert least <= len(tokenizer(text, add_special_tokens=False)["input_ids"])
        found += least > 0
    assert found


def test_tokenizers_that_may_drop_text_have_no_bound() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]")))  # type: ignore[no-untyped-call]
    stripping = byte_tokenizer()
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    dropping = byte_tokenizer()
    dropping.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]
    )
    greedy = byte_tokenizer()
    greedy.add_tokens([AddedToken("<mask>", lstrip=True)])
    backend = Tokenizer(BPE({"a": 0}, []))  # of characters that it does not know it makes nothing
    backend.decoder = decoders.Fuse()
    unknown = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    for tokenizer in (words, stripping, dropping, greedy, unknown):
        assert PromptLength(tokenizer).min_tokens("x" * 1_000_000) == 0


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    codec = Codec(tokenizer, frozenset({256}), 100, 258)
    prompt = GenerationRequest(model="m", prompt="x" * 10_000, sampling=SamplingParameters(seed=0))
    monkeypatch.setattr(PreTrainedTokenizerFast, "backend_tokenizer", property(lambda self: pytest.fail("tokenized")))
    with pytest.raises(PromptTooLong, match=r"has at least 2000 tokens .* context of 100 tokens"):
        codec.encode(prompt, COMPLETIONS_ENDPOINT)
