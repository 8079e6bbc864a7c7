"""What a run is evaluated against need not be what it is trained on."""

from capjax.commands.build import build_data, build_source
from capjax.commands.settings import load_config
from capjax.data.captions import first_caption, reference_texts
from capjax.data.sources import open_source


def test_vague_captions_are_drawn_and_full_ones_are_references():
    config = load_config("emoji_vague")
    data, source = build_data(config), build_source(config)
    assert reference_texts(source[3], data.captions) == [source[3].captions[-1].text.lower()]
    held_out = open_source(config.evaluate.splits["composition"])[0]
    assert reference_texts(held_out, data.captions) == []
    full = held_out.captions[0].text.lower()
    assert reference_texts(held_out, data.references) == [full]
    assert first_caption(held_out, data.references) == full


def test_references_are_of_the_captions_drawn_unless_others_are_named():
    config = load_config("emoji_quickstart")
    data = build_data(config)
    assert data.references == data.captions
    with config.unlocked():
        del config.evaluate.references  # of an older checkpoint
    assert build_data(config) == data
