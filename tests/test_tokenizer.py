"""Tokenizers: truncation keeps the end token, unknown words speak, CLIP's ids are CLIP's."""

from __future__ import annotations

import pytest
import torch

from segclip_fast.config import TextConfig
from segclip_fast.data.tokenizer import CLIPTokenizer, WordTokenizer, tokenizer_for


def test_words():
    tokenize = WordTokenizer(("a", "cat", "photo", "of"), 8)
    assert tokenize(["A photo of a cat."]).tolist() == [[5, 1, 3, 4, 1, 2, 6, 0]]
    assert tokenize(["cat"], 3).tolist() == [[5, 2, 6]]


def test_long_captions_keep_their_end():
    tokenize = WordTokenizer(("cat",), 5)
    assert tokenize(["cat " * 50]).tolist() == [[2, 1, 1, 1, 3]]
    ids = CLIPTokenizer(77)(["a very long description " * 60, "short"])
    assert ids.shape == (2, 77)
    assert ids[0, 0] == 49406
    assert ids[0, -1] == 49407
    assert ids[1, 2] == 49407
    assert not ids[1, 3:].any()


def test_clip_ids_and_cleaning():
    tokenize = CLIPTokenizer(77)
    assert tokenize(["a photo of a cat."], 9).tolist() == [[49406, 320, 1125, 539, 320, 2368, 269, 49407, 0]]
    assert torch.equal(tokenize(["  A  Photo &amp;amp; more "]), tokenize(["a photo & more"]))


def test_unknown_words():
    with pytest.raises(
        ValueError, match=r"texts: expected words of the model's vocabulary .*unknown \['dog'"
    ):
        WordTokenizer(("cat",), 5)(["cat dog"])


def test_choice_by_config():
    assert isinstance(tokenizer_for(TextConfig()), CLIPTokenizer)
    assert isinstance(tokenizer_for(TextConfig(vocab_size=4, vocabulary=("cat",))), WordTokenizer)
