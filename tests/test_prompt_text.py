"""Prompts are cleaned as Wan does it and tokenized without loss."""

import pytest

from workers.models.prompt_text import Tokenizer, clean, pocket_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return pocket_tokenizer()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a   red\tcircle\n", "a red circle"),
        ("fish &amp;amp; chips &lt;3", "fish & chips <3"),
        ("schÃ¶n", "schön"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("ﬁre", "fire"),
        ("   ", ""),
        ("雪の中の狐", "雪の中の狐"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    assert clean(clean(text)) == cleaned


def test_ids_end_with_the_end_and_are_not_cut(tokenizer: Tokenizer) -> None:
    ids = tokenizer.ids("a red circle moving right")
    assert ids[-1] == 1
    assert ids == tokenizer.ids("a red circle moving right")
    assert len(tokenizer.ids("circle " * 600)) > 512


@pytest.mark.parametrize("text", ["a blue star", "Füchslein", "雪", "🦊", "x" * 50, "tab\tand &"])
def test_nothing_is_unknown(tokenizer: Tokenizer, text: str) -> None:
    """What has no piece is spelt in bytes; no token stands for anything at all."""
    ids = tokenizer.ids(text)
    assert 2 not in ids
    assert all(0 <= token < 1000 for token in ids)


def test_texts_differ_in_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.ids("a red circle") != tokenizer.ids("a blue circle")
