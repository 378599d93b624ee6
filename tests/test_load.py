"""Configurations: shipped ones load, overrides reach every key, and each mistake is one line that helps."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.load import as_yaml, check_model_files, load_config, shipped_names
from configs.schema import RuntimeConfig
from ipc.errors import ConfigError


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_configurations_load_and_survive_a_round_trip_through_yaml(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.name == name
    (tmp_path / "copy.yaml").write_text(as_yaml(config), encoding="utf-8")
    assert load_config(str(tmp_path / "copy.yaml")) == config


def test_both_published_names_are_shipped() -> None:
    assert {"pocket", "longlive-1.3b"} <= set(shipped_names())


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda c: c.seed == 7),
        ("stream.window=9", lambda c: c.stream.window == 9),
        ("stream.steps=[1000, 500]", lambda c: c.stream.steps == (1000, 500)),
        ("stages.denoiser.device=cuda:1", lambda c: c.stage("denoiser").device == "cuda:1"),
        ("output.out=[a.mp4, 'null:']", lambda c: c.output.out == ("a.mp4", "null:")),
        ("prompt=a fox = a dog", lambda c: c.prompt == "a fox = a dog"),
        (" stream.rope = absolute", lambda c: c.stream.rope == "absolute"),
        ("model.lora={rank: 4, alpha: 8}", lambda c: c.model.lora is not None and c.model.lora.alpha == 8),
        ("model.path=", lambda c: c.model.path is None),
    ],
)
def test_an_override_reaches_its_key(override: str, read: Callable[[RuntimeConfig], bool]) -> None:
    assert read(load_config("pocket", [override]))


def test_parts_that_are_missing_or_null_are_created_and_the_last_override_wins() -> None:
    config = load_config("pocket", ["model.lora=null", "model.lora.rank=4", "model.lora.alpha=8", "model.lora.rank=16"])
    assert config.model.lora is not None
    assert (config.model.lora.rank, config.model.lora.alpha) == (16, 8)


def test_paths_are_of_the_current_folder_or_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_config("pocket", ["model.path=weights"]).model.path == tmp_path / "weights"
    assert load_config("pocket", ["model.path=~/weights"]).model.path == tmp_path / "home" / "weights"
    assert load_config("pocket", ["output.ffmpeg=bin/ffmpeg"]).output.ffmpeg == tmp_path / "bin" / "ffmpeg"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").write_text(as_yaml(load_config("pocket", ["seed=5"])))
    assert load_config("~/mine").seed == 5


def test_a_shipped_name_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").write_text("name: other")
    assert load_config("pocket").name == "pocket"


MISTAKES = {
    # override: words of the line
    "stream.windw=3": ["unknown key stream.windw", "did you mean stream.window?"],
    "windw=3": ["unknown key windw", "did you mean stream.window?"],
    "window=3": ["did you mean stream.window?"],
    "pace=free": ["unknown key pace", "did you mean output.pace?"],
    "stages.denoser.threads=1": ["unknown key stages.denoser", "did you mean stages.denoiser?", "--set"],
    "zzzz=1": ["unknown key zzzz", "known here are name, preset, prompt, seed"],
    "stream.zzzz=1": ["unknown key stream.zzzz", "known here are frames_per_block, window"],
    "stream.window=11": ["--set stream.window=11", "multiple of frames_per_block 3, found 11"],
    "stream.sink=12": ["window 12 must hold sink 12"],
    "stream.steps=[250, 500]": ["steps must fall", "[250, 500]"],
    "stream.steps=[1000, 0]": ["stream.steps.1", "found 0", "greater than 0"],
    "video.height=100": ["divisible by 16", "100x160"],
    "video.height=-16": ["video.height", "found -16", "greater than 0"],
    "video.height=abc": ["video.height", "found abc", "integer"],
    "video.height=1.5": ["video.height", "found 1.5"],
    "device=gpu": ["device", "found gpu", "cpu, cuda or cuda:NUMBER"],
    "output.pace=fast": ["output.pace", "found fast", "'live', 'free' or 'serial'"],
    "output.out=null:": ["output.out", "expected a list"],
    "model=3": ["model", "found 3", "a mapping of keys"],
    "model.lora={rank: 4}": ["model.lora.alpha", "found nothing"],
    "stream.recache=recent(4)": ["recent(N) needs a multiple of frames_per_block 3", "recent(4)"],
    "stream.recache=some": ["stream.recache", "found some", "full, none, recent(LATENT FRAMES) or blend(SECONDS)"],
    "stream.recache=blend(0.0)": ["blend(SECONDS) needs more than 0", "blend(0.0)"],
    "stream.recache=blend(-1)": ["stream.recache", "found blend(-1)"],
    "stream.switch=now": ["stream.switch", "found now", "'boundary' or 'abort'"],
    "seed=-1": ["seed", "found -1", "greater than or equal to 0"],
    "seed=9223372036854775808": ["seed", "less than"],
    "seed.x=3": ["seed is 0 and has no keys"],
    "prompt=": ["prompt", "found nothing", "string"],
    "prompt=''": ["prompt", "at least 1 character"],
    "prompt=a: b": ["prompt", "found {'a': 'b'}"],
    "seed": ["expected KEY=VALUE"],
    "=3": ["expected KEY=VALUE"],
    "a..b=3": ["expected KEY=VALUE"],
    "seed=[1": ["not valid YAML"],
    "seed={a: 1, a: 2}": ["key a is there twice"],
    "seed=2024-13-45": ["not valid YAML"],
    f"seed={'9' * 5000}": ["not valid YAML"],
    f"seed={'[' * 5000}": ["nested too deeply"],
    "seed=!!python/object/apply:os.getcwd []": ["not valid YAML", "python/object"],
    "prompt=a\0b": ["not valid YAML"],
    'prompt="\\ud800"': ["prompt"],
    "seed=nan": ["seed"],
    "stream.timestep_shift=.inf": ["stream.timestep_shift", "finite"],
    "{a: 1}=2": ["unknown key {a: 1}"],
}


@pytest.mark.parametrize("override", MISTAKES, ids=lambda override: override[:30])
def test_a_wrong_override_is_one_helpful_line(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("pocket", [override])
    _check_line(str(error.value), MISTAKES[override])


FILES = {
    "syntax": ("name: pocket\nseed: [1\n", ["line 3", "not valid YAML"]),
    "tab": ("name: pocket\n\tseed: 1\n", ["line 2", "not valid YAML"]),
    "twice": ("name: pocket\nvideo:\n  fps: 16\n  fps: 8\n", ["line 4", "key fps is there twice"]),
    "list": ("- 1\n", ["found a list", "expected a mapping"]),
    "empty": ("", ["found nothing", "expected a mapping"]),
    "text": ("hello", ["found hello", "expected a mapping"]),
    "missing": ("name: mine\nprompt: a fox\n", ["model: found nothing", "more)"]),
    "tag": ("name: !!python/name:os.system\n", ["line 1", "not valid YAML"]),
    "number key": ("1: 2\n", ["config"]),
    "list key": ("? [a]\n: 2\n", ["not valid YAML"]),
    "two documents": ("a: 1\n---\nb: 2\n", ["not valid YAML"]),
    "alias": ("a: *b\n", ["not valid YAML", "undefined alias"]),
    "loop": ("name: &a [*a]\n", ["config"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_one_helpful_line(case: str, tmp_path: Path) -> None:
    text, words = FILES[case]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    _check_line(str(error.value), [str(path), *words])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pockt", ["did you mean pocket?", "known are longlive-1.3b, pocket"]),
        ("longlive", ["did you mean longlive-1.3b?"]),
        ("qqq", ["known are", "path of a YAML file"]),
        ("", ["known are"]),
        ("./no.yaml", ["no such file"]),
        ("/", ["found a folder"]),
        ("~nobody-9/x.yaml", ["no home folder"]),
        ("bad\nname", ["known are"]),
        ("bad\0name.yaml", ["config"]),
    ],
)
def test_a_wrong_name_is_one_helpful_line(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(name)
    _check_line(str(error.value), words)


def test_bytes_that_are_no_text_and_unreadable_paths(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(str(path))


def test_an_override_is_blamed_only_for_what_it_can_have_caused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(as_yaml(load_config("pocket")).replace("window: 12", "window: 13"))
    with pytest.raises(ConfigError, match=r"config .*mine.yaml: stream: window"):
        load_config(str(path), ["stream.rope=absolute", "seed=3"])


def test_model_files_are_asked_for_only_where_weights_are_real(tmp_path: Path) -> None:
    check_model_files(load_config("pocket", ["model.random_weights=true"]))
    check_model_files(load_config("longlive-1.3b", [f"model.path={tmp_path}"]))
    with pytest.raises(ConfigError, match=r"model\.path.*--set model\.path=FOLDER"):
        check_model_files(load_config("longlive-1.3b"))
    with pytest.raises(ConfigError, match="no such folder"):
        check_model_files(load_config("longlive-1.3b", [f"model.path={tmp_path / 'gone'}"]))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="found a file"):
        check_model_files(load_config("longlive-1.3b", [f"model.path={tmp_path / 'file'}"]))


@given(st.text(max_size=40))
def test_any_text_as_override_loads_or_is_one_line(text: str) -> None:
    for override in (text, f"seed={text}", f"{text}=1", f"stream.{text}=1"):
        try:
            config = load_config("pocket", [override])
        except ConfigError as error:
            _check_line(str(error), [])
        else:
            assert isinstance(config, RuntimeConfig)


def _check_line(line: str, words: list[str]) -> None:
    assert line.isprintable() and line, repr(line)
    assert len(line) < 500
    for word in words:
        assert word in line
