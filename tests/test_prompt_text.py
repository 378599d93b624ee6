"""Prompts are cleaned as Wan does it and tokenized without loss."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from workers.models.prompt_text import POCKET_TOKENIZER, Tokenizer, clean, pocket_tokenizer


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
        ("", ""),
        ("a\u00a0\u3000b\u2003c", "a b c"),
        ("\x1b[31mred\x1b[0m\x00", "red"),
        ("a &nbsp; b &#128512;", "a b \U0001f600"),
        ("<b> &amp;amp;amp;", "<b> &amp;"),
        ("\uff37\uff29\uff24\uff25", "WIDE"),
        ("雪の中の狐", "雪の中の狐"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    """ftfy's repairs, entities twice and not thrice, any run of white space one space."""
    assert clean(text) == cleaned


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


def test_ordinary_prompts_cost_few_tokens(tokenizer: Tokenizer) -> None:
    """Words of the embedded model's captions are pieces, other English is at most two letters a token."""
    text = "A realistic video of a red fox trotting through a snowy forest at dawn, soft light, cinematic"
    assert len(tokenizer.ids("a blue square moving right")) <= 8
    assert len(tokenizer.ids(text)) <= len(text) / 2


def test_the_asset_is_what_its_script_trains(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """At most 1,000 pieces in less than 100 kB, special tokens first; the same bytes every time."""
    script = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "train_tokenizer.py"))
    script["write"](tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (POCKET_TOKENIZER / name).read_bytes()
    assert tokenizer.size <= 1000
    assert sum(path.stat().st_size for path in POCKET_TOKENIZER.iterdir()) < 100_000
    vocabulary = json.loads((POCKET_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert [piece for piece, _ in vocabulary[:3]] == ["<pad>", "</s>", "<unk>"]


TEXTS = ["a red circle", "Two blue stars.", "雪の中の狐", "🦊 50% & more"]


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_reads_the_same_files(tokenizer: Tokenizer, text: str) -> None:
    whole = AutoTokenizer.from_pretrained(str(POCKET_TOKENIZER), local_files_only=True)
    assert tokenizer.ids(text) == whole(text)["input_ids"]


def test_the_file_alone_says_how_text_is_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """google/umt5-xxl names the class T5Tokenizer, by which transformers 5 would lose the bytes; nor may a file cut."""
    folder = shutil.copytree(POCKET_TOKENIZER, tmp_path / "umt5")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    held = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    held["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fixed = {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None}
    held["padding"] = fixed | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    (folder / "tokenizer.json").write_text(json.dumps(held), encoding="utf-8")
    for text in TEXTS:
        assert Tokenizer(folder).ids(text) == tokenizer.ids(text)
