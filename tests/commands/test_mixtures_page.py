"""What docs/mixtures.md writes is a config: its flags, and its lines of a config file."""

import re
import shlex
from pathlib import Path

from ml_collections import ConfigDict

from capjax.commands.build import build_captions
from capjax.commands.settings import load_config
from capjax.data.captions import CaptionChoice
from capjax.data.mixture import parse_schedule

PAGE = (Path(__file__).parents[2] / "docs" / "mixtures.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [text for of, text in found if of == language]


def test_flags_and_lines_say_the_same():
    words = shlex.split(" ".join(blocks("")).replace("\\\n", " "))
    flags = [word for word in words if word.startswith("--config.")]
    by_flags = load_config("emoji_quickstart", ["captions.sources=", *flags])
    config = load_config("emoji_quickstart", ["captions.sources="])
    with config.unlocked():
        for block in blocks("python"):
            exec(block, {"config": config, "ConfigDict": ConfigDict})
    for found in (by_flags, config):
        names = tuple(sorted(found.data.mixture))
        assert names == ("coco", "web")
        assert parse_schedule(found.data.schedule, names) == ((0, (1.0, 3.0)),)
        assert build_captions(found).of("coco").sentences == "all"
    assert build_captions(by_flags).of("web") == CaptionChoice(
        {"alt": 1.0, "long": 3.0}, sentences="run", max_tokens=32
    )
    framed = build_captions(config).of("web")
    assert (framed.sentences, framed.templates) == ("run", ("web: {caption}",))


def test_the_table_names_every_field():
    table = PAGE[PAGE.index("| field |") :]
    for field in load_config("emoji_quickstart").captions:
        assert f"`captions.{field}`" in table
