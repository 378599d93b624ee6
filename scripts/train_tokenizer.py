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
WORDS = """
about above across after again against air all along also an and animal are area around as at autumn away back bag
band bank bar bark beach bear beautiful bed bee before behind below bench beside between bicycle big bike bird black
blossom blue board boat body book both bottle bottom bowl boy branch breaks bridge bright brown brush building burning
bus busy butterfly by cafe cake calm camera candle car castle cat cave center chair change changes child children
cinematic city clean clear clock close closer clothes cloud clouds coast coat coffee cold color colour colours corn
corner could country covered crowd cup curtain dance dancing dark dawn day daylight deep deer desert desk detail
detailed details dinner distance does dog door down dragon drawing dress dries drinks drive driving drop during dusk
dust each early earth eating edge elderly elephant empty evening every eye eyes face fades falling farm fast father
feet field film fire first fish flag floating floor flower flowers flying focus fog follows food foot for forest fox
frame fresh friends from front fruit full garden gentle giant girl glass glowing goes gold golden grass green grey
ground group hair half hand hands happy hat have head heavy her here high hill his holding holds home horse hot house
ice in inside into is island it its jacket jumping jumps just keeps kitchen lake lamp land landscape large last
laughing leaf leaves left leg lens letter light lights like line lines lion little long look looking looks low machine
made makes man many map market meadow metal middle mirror mist moment moon morning mother motion mountain mountains
mouth moves movie moving music narrow nature near neon new next night no north not nothing now ocean of off old on one
only open opens or other out outside over own paint painting paper park part passing past path people person photo
picture piece place plain plane plant plants play playing plays pocket portrait pot pouring quality quick quiet rabbit
rain rainbow raining reading realistic reflection rests riding right rises river road robot rock rocks roof room round
running runs sail sand scene school sea seen shadow shadows sharp she shines ship shirt shoes shop shore short shot
shows side silver singing sitting sits sky sleeping slow slowly small smile smiles smiling smoke smooth snow snowy
soft some space spring stairs standing stands stars stone stops storm street strong style summer sun sunlight sunny
sunrise sunset surface swimming table takes talking tall tea team texture than that the their them then there these
they thick thin thing this three through time to toward towards tower town toy train trees trotting turns two under
until up vase vehicle very video view village walking walks wall warm was watching water waterfall wave waves way
wearing wet wheel when where which while white wide wild wind window windows wine winter with without woman women wood
wooden woods words work world writes yellow young zebra zoom zooms
"""
SIGNS = "0 1 2 3 4 5 6 7 8 9 . , ; : ! ? ' \" ( ) - / & % + # 's 't 16 24 1080 2024 ing ed er ly es s"
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
REPEATS = 40
"""How often plain English stands in the corpus, beside some 9,000 captions."""


def captions() -> list[str]:
    """Sentences in the manner of prompts for the embedded model, and plain English words in both cases."""
    made = []
    things = itertools.product(COUNTS, SIZES, COLOURS, SHAPES)
    scenes = itertools.cycle(itertools.product(MOTIONS, TONES, COLOURS, GROUNDS))
    for (count, size, colour, shape), (motion, tone, ground, kind) in zip(things, scenes, strict=False):
        many = "s" if count in ("two", "a pair of") else ""
        text = f"{count} {size} {colour} {shape}{many} {motion} on a {tone} {ground} {kind}"
        made.append(" ".join(text.split()))
        made.append(" ".join(text.split()).capitalize() + ".")
    words = WORDS.split()
    letters = [chr(code) for first in "aA" for code in range(ord(first), ord(first) + 26)]
    plain = [*PROSE, *words, *SIGNS.split(), *letters]
    return made + plain * REPEATS + [word.capitalize() for word in words]


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


def write(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    whole = Tokenizer(models.Unigram(trained_pieces(), unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    whole.normalizer = normalizers.NFKC()
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    whole.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    whole.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    whole.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(OUT)
