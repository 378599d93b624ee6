"""Trains the embedded model's tokenizer: a Unigram model of at most 1,000 pieces, with bytes for all else.

    .venv/bin/python scripts/train_tokenizer.py

The corpus is rendered from the grammar below, in a fixed order; the same files come out every time.
"""

import io
import itertools
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

OUT = Path(__file__).parent.parent / "workers" / "assets" / "pocket" / "tokenizer"
PIECES = 1000
SPECIAL = ("<pad>", "</s>", "<unk>")

COUNTS = ("a", "one", "two", "a pair of", "a single")
SIZES = ("", "small", "big", "large", "tiny", "huge")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "pink", "cyan", "black", "grey", "brown")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring", "cross", "ball", "heart", "hexagon", "box", "disc")
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "moving diagonally",
    "bouncing",
    "circling",
    "going in circles",
    "growing",
    "shrinking",
    "standing still",
    "drifting slowly",
    "falling",
    "rising",
    "turning",
    "spinning fast",
)
GROUNDS = (
    "background",
    "ground",
    "plain background",
    "striped background",
    "checkered background",
    "dotted background",
)
TONES = ("", "dark", "light", "bright", "pale")
PROSE = (
    "the scene shows an object in front of a wall while the camera follows it",
    "a realistic video of a fox trotting through a snowy forest at dawn with soft light, cinematic",
    "then it changes into another colour and moves to the other side of the picture",
    "people walk along the street in the evening, cars pass by, it is raining",
    "a woman smiles and looks at the sea, waves roll over the beach under a blue sky",
    "the cat jumps over the table and sleeps on the warm chair near the window",
    "slow motion, high quality, sharp details, close up, wide shot, from above, from below",
    "his hands hold the book and their house stands between two old trees on the hill",
)


def captions() -> list[str]:
    """Sentences in the manner of prompts for the embedded model, and some plain English."""
    made = []
    things = itertools.product(COUNTS, SIZES, COLOURS, SHAPES)
    scenes = itertools.cycle(itertools.product(MOTIONS, TONES, COLOURS, GROUNDS))
    for (count, size, colour, shape), (motion, tone, ground, kind) in zip(things, scenes, strict=False):
        many = "s" if count in ("two", "a pair of") else ""
        text = f"{count} {size} {colour} {shape}{many} {motion} on a {tone} {ground} {kind}"
        made.append(" ".join(text.split()))
        made.append(" ".join(text.split()).capitalize() + ".")
    return made + list(PROSE) * 200


def trained_pieces() -> list[tuple[str, float]]:
    """Pieces and their log probabilities: special ones, 256 bytes, then what the corpus taught."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions()),
        model_writer=model,
        model_type="unigram",
        vocab_size=PIECES,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece=SPECIAL[0],
        eos_piece=SPECIAL[1],
        unk_piece=SPECIAL[2],
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]


def main() -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    whole = Tokenizer(models.Unigram(trained_pieces(), unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    whole.normalizer = normalizers.NFKC()
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    whole.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    whole.add_special_tokens(list(SPECIAL))
    OUT.mkdir(parents=True, exist_ok=True)
    whole.save(str(OUT / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (OUT / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
