"""`capjax config`: what it prints is stable, complete, and can be typed back."""

import pytest

from capjax import cli
from capjax.commands import settings

CONFIG = '''"""{summary}

More.
"""
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({fields})
'''


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Two small configs in the place of the shipped ones."""
    small = {"steps": 10, "model": {"width": 64, "scale": (0.5, 1.0)}, "name": "a b"}
    large = {"steps": 20, "model": {"width": 64, "depth": 2}, "name": "a b"}
    for name, fields in (("small", small), ("large", large)):
        text = CONFIG.format(summary=f"The {name} one.", fields=repr(fields))
        (tmp_path / f"{name}.py").write_text(text)
    paths = {name: tmp_path / f"{name}.py" for name in ("large", "small")}
    monkeypatch.setattr(settings, "shipped_configs", lambda: paths)
    return tmp_path


def output(capsys, *args):
    assert cli.main(["config", *args]) == 0
    return capsys.readouterr().out.splitlines()


def test_list_shows_names_and_summaries(shipped, capsys):
    assert output(capsys, "list") == ["large  The large one.", "small  The small one."]


def test_show_prints_every_field_with_overrides(shipped, capsys):
    lines = output(capsys, "show", "small", "--config.model.width=128")
    assert lines == [
        "model.scale = [0.5, 1.0]",
        "model.width = 128",
        'name = "a b"',
        "steps = 10",
    ]


def test_diff_prints_the_fields_that_differ(shipped, capsys):
    assert output(capsys, "diff", "small", str(shipped / "large.py")) == [
        "+ model.depth = 2",
        "- model.scale = [0.5, 1.0]",
        "- steps = 10",
        "+ steps = 20",
    ]
    assert output(capsys, "diff", "small", "small") == []


def test_the_shipped_configs_are_those_of_the_checkout(capsys):
    names = [line.split()[0] for line in output(capsys, "list")]
    assert names == list(settings.shipped_configs())
    for name in names:
        assert output(capsys, "show", name)
