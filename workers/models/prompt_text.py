"""From what a person typed to token ids: Wan's cleaning, then the tokenizer beside the weights.

Cleaning is that of Wan 2.1 (wan/modules/tokenizers.py, mode `whitespace`): ftfy, HTML entities twice, whitespace.
Knows no encoder.
"""

import html
from pathlib import Path

import ftfy
import regex
import tokenizers

from ipc.errors import CheckpointError

ASSETS = Path(__file__).parent.parent / "assets"
POCKET_TOKENIZER = ASSETS / "pocket" / "tokenizer"
END = "</s>"
"""The token that UMT5 expects last."""


def clean(text: str) -> str:
    """The text that is tokenized, and by which embeddings are cached."""
    fixed = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", fixed).strip()


class Tokenizer:
    """The tokenizer that a folder's tokenizer.json describes; nothing is downloaded and no code of the folder is run.

    The file alone says how text is cut: transformers 5 would rebuild google/umt5-xxl from the class its
    tokenizer_config.json names, T5Tokenizer, and lose byte fallback and the file's own normalisation on the way.

    Args:
        path: folder with tokenizer.json.

    Raises:
        CheckpointError: the folder holds no tokenizer, or one that does not end a text as UMT5 expects.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{path}: found no tokenizer.json, expected the tokenizer's folder; download it again"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(file.read_bytes())
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{file}: not a readable tokenizer ({reason}); download it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if self.ids("")[-1:] != [self._tokenizer.token_to_id(END)]:
            raise CheckpointError(f"{file}: found a text without {END} at its end, expected UMT5's tokenizer")

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def ids(self, text: str) -> list[int]:
        """Token ids of a cleaned text, the end-of-text token included, never cut."""
        return list(self._tokenizer.encode(text).ids)


def pocket_tokenizer() -> Tokenizer:
    """The embedded model's tokenizer."""
    return Tokenizer(POCKET_TOKENIZER)
