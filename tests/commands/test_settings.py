"""Configs load, overrides take the field's type, and every mistake is one line with a mend."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

from capjax.commands import settings
from capjax.errors import UserError

CONFIG = '''"""A small config.

More about it.
"""
from ml_collections import ConfigDict, config_dict

def get_config(arg=""):
    config = ConfigDict()
    config.total_steps = 100
    config.label = arg or "none given"
    config.limit = config_dict.placeholder(int)
    config.anything = None
    config.shuffle = True
    config.model = ConfigDict({"width": 64, "rate": 0.5, "scale": (0.5, 1.0), "names": ("a", "b")})
    config.optimizer = ConfigDict({"learning_rate": 1e-3, "empty": ()})
    return config
'''


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def override(path, *overrides):
    return settings.resolved_dict(settings.load_config(str(path), overrides))


def get(tree, name):
    return settings.flatten(tree)[name]


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("total_steps=250", "total_steps", 250),
        ("total_steps=1e3", "total_steps", 1000),
        ("total_steps=1_000", "total_steps", 1000),
        ("total_steps=2.5k", "total_steps", 2500),
        ("total_steps=10M", "total_steps", 10_000_000),
        ("total_steps=3B", "total_steps", 3_000_000_000),
        ("total_steps=9007199254740993", "total_steps", 9007199254740993),  # 2**53 + 1
        ("total_steps=-1", "total_steps", -1),
        ("--config.total_steps=7", "total_steps", 7),
        ("label=a=b", "label", "a=b"),
        ("label=", "label", ""),
        ("label=none", "label", "none"),
        ("limit=10k", "limit", 10_000),
        ("limit=None", "limit", None),
        ("anything=3", "anything", 3),
        ("anything=text", "anything", "text"),
        ("anything=true", "anything", True),
        ("shuffle=False", "shuffle", False),
        ("shuffle=1", "shuffle", True),
        ("model.rate=1", "model.rate", 1.0),
        ("model.rate=1e-4", "model.rate", 1e-4),
        ("model.scale=(1,2)", "model.scale", [1.0, 2.0]),
        ("model.scale=0.25,1", "model.scale", [0.25, 1.0]),
        ("model.names=[x, y,z]", "model.names", ["x", "y", "z"]),
        ("model.names=('x',)", "model.names", ["x"]),
        ("model.names=", "model.names", []),
        ("optimizer.empty=1,x", "optimizer.empty", [1, "x"]),
        ("optimizer.empty=(1,2),(3,4)", "optimizer.empty", [(1, 2), (3, 4)]),
    ],
)
def test_an_override_takes_the_type_of_its_field(config_path, text, field, value):
    value = json.loads(json.dumps(value))
    got = get(override(config_path, text), field)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("total_steps=many", ["total_steps=many", "whole number"]),
        ("total_steps=0.5", ["total_steps=0.5", "whole number"]),
        ("total_steps=None", ["whole number"]),
        ("total_steps", ["total_steps=", "whole number"]),
        ("limit=x", ["limit=x", "whole number"]),
        ("shuffle=maybe", ["shuffle=maybe", "true or false"]),
        ("model.rate=fast", ["model.rate=fast", "a number"]),
        ("model.rate=nan", ["model.rate=nan", "a number"]),
        ("model.scale=a,b", ["model.scale=a,b", "a list"]),
        ("model.scale=(1,[", ["a list"]),
        ("model=3", ["model is a section", "width"]),
        ("model.widht=3", ["no such field", "did you mean model.width?"]),
        ("modl.width=3", ["did you mean model.width?"]),
        ("learning_rate=1", ["did you mean optimizer.learning_rate?"]),
        ("model.width.more=1", ["no such field"]),
        ("zzz=1", ["no such field", "fields there", "total_steps"]),
    ],
)
def test_a_wrong_override_is_one_clear_line(config_path, text, words):
    with pytest.raises(UserError) as error:
        override(config_path, text)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@given(st.integers(min_value=-(10**20), max_value=10**20))
def test_whole_numbers_survive_as_text(value):
    assert settings.parse_value(str(value), 0, int, "n") == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_as_text(value):
    assert settings.parse_value(repr(value), 0.0, float, "x") == value


@given(st.text())
def test_no_text_crashes_a_field(text):
    for current in (True, 1, 1.0, "x", (1, 2), ("a",), (), [1.5], None):
        try:
            settings.parse_value(text, current, type(current), "field")
        except UserError as error:
            assert "field" in str(error)  # the only exception it may raise


def test_shown_values_can_be_given_back_as_overrides(config_path):
    tree = override(config_path)
    for field, value in settings.flatten(tree).items():
        text = value if isinstance(value, str) else json.dumps(value)
        assert override(config_path, f"{field}={text}") == tree


def test_the_argument_after_the_colon_reaches_get_config(config_path):
    assert override(f"{config_path}:big")["label"] == "big"
    assert override(config_path)["label"] == "none given"


def test_an_argument_that_a_config_does_not_take_is_refused():
    with pytest.raises(UserError, match=r"takes no argument, got 'res=384'; --config\.a\.b=v"):
        settings.load_config("cappa_b16:res=384")


def test_a_split_can_be_added():
    splits = settings.load_config("siglip_b16", ["evaluate.splits.coco=photos/"]).evaluate.splits
    assert splits.to_dict() == {"coco": "photos/"}


def test_the_config_is_locked(config_path):
    config = settings.load_config(str(config_path))
    with pytest.raises((KeyError, AttributeError)):
        config.model.new_field = 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1", ["has no get_config"]),
        ("def get_config(): return {}", ["returns no ConfigDict"]),
        ("def get_config(): raise ValueError('no such size\\nmore')", ["ValueError: no such size"]),
        ("def get_config(:", ["SyntaxError"]),
        ("import not_there_at_all", ["not_there_at_all"]),
    ],
)
def test_a_broken_config_file_is_one_clear_line(tmp_path, content, words):
    path = tmp_path / "broken.py"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        settings.load_config(str(path))
    assert all(word in str(error.value) for word in [*words, str(path)])
    assert "\n" not in str(error.value)


def test_a_missing_config_names_what_there_is(tmp_path, monkeypatch, config_path):
    shipped = {"emoji_quickstart": config_path}
    monkeypatch.setattr(settings, "shipped_configs", lambda: shipped)
    assert settings.load_config("emoji_quickstart").total_steps == 100
    with pytest.raises(UserError, match=r"did you mean emoji_quickstart\?"):
        settings.load_config("emoji_quikstart")
    with pytest.raises(UserError, match="shipped: emoji_quickstart"):
        settings.load_config("zzz")
    with pytest.raises(UserError, match="does not exist; did you mean emoji_quickstart"):
        settings.load_config("configs/emoji_quickstar.py")
    with pytest.raises(UserError, match="is no Python file"):
        settings.load_config(str(tmp_path))


def test_every_shipped_config_resolves_to_json_and_says_what_it_is():
    for name, path in settings.shipped_configs().items():
        tree = settings.resolved_dict(settings.load_config(name))
        assert json.loads(json.dumps(tree)) == tree
        assert settings.summary(path)


def test_a_config_holds_data_only():
    config = ConfigDict({"a": {"b": print}})
    with pytest.raises(UserError, match=r"config\.a\.b is a builtin_function_or_method"):
        settings.resolved_dict(config)


def test_placeholders_resolve_to_none():
    config = ConfigDict({"n": config_dict.placeholder(int)})
    assert settings.resolved_dict(config) == {"n": None}


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    width: int
    rate: float = 0.0
    name: Literal["cosine", "constant"] = "cosine"
    shape: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    limit: int | None = None
    fast: bool = False
    inner: Inner = Inner()

    def __post_init__(self):
        if self.width < 0:
            raise ValueError("width must not be negative")


def test_a_dataclass_from_a_section():
    section = ConfigDict(
        {
            "width": 3,
            "rate": 1,
            "shape": [1, 2],
            "pair": (0, 2),
            "limit": None,
            "inner": {"depth": 4},
        }
    )
    made = settings.from_dataclass_kwargs(Outer, section, "model")
    assert made == Outer(3, 1.0, shape=(1, 2), pair=(0.0, 2.0), inner=Inner(4))
    assert type(made.rate) is float
    assert hash(made)  # lists became tuples
    assert settings.from_dataclass_kwargs(Outer, {"width": 1, "limit": 5}, "model").limit == 5


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, ["model.width is missing", "whole number"]),
        ({"width": 1, "widht": 2}, ["model.widht=2", "did you mean width?"]),
        ({"width": 1, "zzz": 2}, ["model.zzz=2", "its fields are width, rate"]),
        ({"width": 1.5}, ["model.width=1.5", "whole number", "got float"]),
        ({"width": True}, ["model.width=True", "whole number"]),
        ({"width": 1, "rate": "x"}, ["model.rate=x", "a number"]),
        ({"width": 1, "fast": 1}, ["model.fast=1", "true or false"]),
        ({"width": 1, "name": "cosin"}, ["one of cosine, constant", "did you mean cosine?"]),
        ({"width": 1, "shape": (1, "x")}, ["model.shape[1]=x", "whole number"]),
        ({"width": 1, "pair": (1.0,)}, ["model.pair=(1.0,)", "a list"]),
        ({"width": 1, "limit": "x"}, ["model.limit=x", "or None"]),
        ({"width": 1, "inner": {"dept": 1}}, ["model.inner.dept=1", "did you mean depth?"]),
        ({"width": -1}, ["model: width must not be negative"]),
    ],
)
def test_a_wrong_section_is_one_clear_line(section, words):
    with pytest.raises(UserError) as error:
        settings.from_dataclass_kwargs(Outer, section, "model")
    assert all(word in str(error.value) for word in words), str(error.value)
