"""From what a person typed to token ids: Wan's cleaning, then the tokenizer beside the weights.

Cleaning is that of Wan 2.1 (wan/modules/tokenizers.py, mode `whitespace`): ftfy, HTML entities twice, whitespace.
Knows no encoder.
"""

import html
import re
from pathlib import Path

import ftfy
from transformers import AutoTokenizer

from ipc.errors import CheckpointError

ASSETS = Path(__file__).parent.parent / "assets"


def clean(text: str) -> str:
    """The text that is tokenized, and by which embeddings are cached."""
    fixed = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", fixed).strip()


class Tokenizer:
    """A tokenizer in transformers' files; nothing is downloaded and no code of the folder is run.

    Args:
        path: folder with tokenizer.json or spiece.model.

    Raises:
        CheckpointError: the folder holds no tokenizer.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{path}: found a file, expected the tokenizer's folder")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(
                f"{path}: not a readable tokenizer ({reason}); expected tokenizer.json or spiece.model and"
                " tokenizer_config.json"
            ) from error

    def ids(self, text: str) -> list[int]:
        """Token ids of a cleaned text, the end-of-text token included, never cut."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=True, truncation=False)["input_ids"]
        return ids


def pocket_tokenizer() -> Tokenizer:
    """The embedded model's tokenizer."""
    return Tokenizer(ASSETS / "pocket" / "tokenizer")
