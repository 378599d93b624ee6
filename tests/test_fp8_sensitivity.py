"""The script that says which linears bear e4m3 measures what it says and names what the configuration takes."""

import json

import pytest
import torch
from fp8_sensitivity import ALL, BFLOAT16, Sensitivity, fewest_kept, in_place, main
from tiny_files import TINY

from configs.load import load_config
from configs.schema import LAYER_LINEARS
from workers.models.fp8 import Linear

SMALL = (*TINY, "video.height=32", "video.width=32", "model.transformer.text_len=16")


def arguments(*more: str) -> list[str]:
    return [part for setting in SMALL for part in ("--set", setting)] + ["--blocks", "2", "--prompt", "a", *more]


@pytest.mark.parametrize(("by", "groups"), [("kind", 6), ("layer", 2), ("linear", 12)])
def test_every_group_is_measured_alone(by: str, groups: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--by", by)) == 0
    text = capsys.readouterr().out
    errors = json.loads(text.splitlines()[-1])["errors"]
    assert len(errors) == groups + 2
    assert all(len(steps) == 4 and min(steps) > 0 for steps in errors.values())
    ranked = [max(steps) for name, steps in errors.items() if name not in (ALL, BFLOAT16)]
    assert ranked == sorted(ranked, reverse=True)
    assert max(errors[BFLOAT16]) < max(errors[ALL])
    assert all(name in text for name in errors)


def test_what_has_to_be_kept_is_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--bar", "0.02")) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["error"] <= 0.02 < max(told["errors"][ALL])
    assert told["fp8_keep"] == list(told["errors"])[2 : 2 + len(told["fp8_keep"])], "the most sensitive"
    config = load_config("pocket", [*SMALL, "execution.linears=fp8", f"execution.fp8_keep={told['fp8_keep']}"])
    assert list(config.execution.fp8_keep) == told["fp8_keep"]
    alone = Sensitivity(config, ["a"], 2)
    assert alone.keeping(told["fp8_keep"]) == pytest.approx(told["error"], rel=1e-3)
    assert alone.keeping(told["fp8_keep"][:-1]) > 0.02


def test_the_fewest_are_kept() -> None:
    class Measured:
        def keeping(self, patterns: list[str]) -> float:
            return 1.0 / (1 + len(patterns))

    ranked = list("abcdefg")
    for bar, kept in ((2.0, ""), (0.5, "a"), (0.3, "abc"), (0.01, "abcdefg")):
        found, error = fewest_kept(Measured(), ranked, bar)  # type: ignore[arg-type]
        assert ("".join(found), error <= bar) == (kept, True)


@torch.no_grad()
def test_linears_go_back_to_their_places() -> None:
    measured = Sensitivity(load_config("pocket", SMALL), ["a"], 1)
    static = measured._passes.static

    def there() -> list[dict[str, Linear]]:
        return [dict(layer.linears) for layer in static.layers]

    before = there()
    with pytest.raises(RuntimeError), in_place(static, measured.fp8):
        for index, layer in enumerate(there()):
            assert all(linear is measured.fp8[f"blocks.{index}.{name}"] for name, linear in layer.items())
        raise RuntimeError
    assert there() == before
    assert {name.split(".", 2)[2] for name in measured.fp8} == set(LAYER_LINEARS)


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "longlive-1.3b"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
