"""The embedded corpus has the properties its README claims, and its builder keeps to them."""

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capjax.data.sources import EMOJI_DIRECTORY, EMOJI_SPLITS, open_source
from capjax.errors import UserError

ROOT = Path(__file__).parents[2]
LUMINANCE = np.array([0.299, 0.587, 0.114])


def load_builder():
    path = ROOT / "tools" / "build_emoji_corpus.py"
    spec = importlib.util.spec_from_file_location("build_emoji_corpus", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


builder = load_builder()
MANIFEST = json.loads((EMOJI_DIRECTORY / "manifest.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def corpus():
    """All examples of every split."""
    sources = {split: open_source(f"emoji:{split}") for split in EMOJI_SPLITS}
    return {split: [source[i] for i in range(len(source))] for split, source in sources.items()}


@pytest.fixture(scope="module")
def captions(corpus):
    """The set of captions of every split."""
    return {split: {e.captions[0].text for e in part} for split, part in corpus.items()}


def pixels(example) -> np.ndarray:
    image = Image.open(io.BytesIO(example.image))
    assert image.mode == "RGB"
    return np.asarray(image, np.float32)


# The corpus


def test_files_match_the_manifest_and_stay_small():
    on_disk = {path.name for path in EMOJI_DIRECTORY.glob("*.array_record")}
    assert on_disk == set(MANIFEST["shards"])
    for name, shard in MANIFEST["shards"].items():
        content = (EMOJI_DIRECTORY / name).read_bytes()
        assert len(content) == shard["bytes"]
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    total = sum(path.stat().st_size for path in EMOJI_DIRECTORY.rglob("*") if path.is_file())
    assert total < 10_000_000


def test_counts_are_those_of_manifest_and_readme(corpus):
    assert {split: builder.count(part) for split, part in corpus.items()} == MANIFEST["splits"]
    readme = (EMOJI_DIRECTORY / "README.md").read_text("utf-8")
    assert builder.counts_table(corpus) in readme
    assert MANIFEST["packages"] == {
        name: package._asdict() for name, package in builder.PACKAGES.items()
    }


def test_licences_of_all_sources_are_there():
    expected = {
        "Apache-2.0-noto-emoji.txt": "Apache License",
        "CC-BY-4.0-twemoji.txt": "https://creativecommons.org/licenses/by/4.0/legalcode",
        "MIT-emoji-datasource.txt": "Cal Henderson",
        "MIT-fluentui-emoji.txt": "Copyright (c) Microsoft Corporation",
        "Unicode-3.0.txt": "UNICODE LICENSE V3",
    }
    directory = EMOJI_DIRECTORY / "LICENSES"
    assert {path.name for path in directory.iterdir()} == set(expected)
    for name, words in expected.items():
        assert words in (directory / name).read_text("utf-8")
    readme = (EMOJI_DIRECTORY / "README.md").read_text("utf-8")
    assert all(licence in readme for licence in ("MIT", "Apache-2.0", "CC-BY-4.0", "Unicode-3.0"))


def test_keys_are_unique_and_name_style_and_code_points(corpus):
    examples = [example for part in corpus.values() for example in part]
    assert len({example.key for example in examples}) == len(examples)
    for example in examples:
        style, codepoints = example.key.split("/")
        assert style == example.metadata["style"]
        assert builder.join_codes(int(code, 16) for code in codepoints.split("-")) == codepoints


def test_examples_have_a_caption_then_keywords_and_the_group_as_label(corpus):
    keywords = 0
    for part in corpus.values():
        for example in part:
            assert [caption.source for caption in example.captions[:1]] == ["tts"]
            assert all(caption.source == "keyword" for caption in example.captions[1:])
            assert all(caption.text and caption.language == "en" for caption in example.captions)
            assert MANIFEST["groups"][example.label] == example.metadata["group"]
            keywords += len(example.captions) - 1
    assert keywords > 6 * sum(map(len, corpus.values()))


def test_images_are_64_by_64_rgb_on_white(corpus):
    corners = []
    for part in corpus.values():
        for example in part[::5]:
            image = pixels(example)
            assert image.shape == (64, 64, 3)
            corners.append(image[0, 0])
    assert np.median(corners) == 255


def test_splits_hold_their_styles(corpus):
    for split, part in corpus.items():
        assert {example.metadata["style"] for example in part} == set(EMOJI_SPLITS[split])


def test_a_caption_is_in_one_split_in_every_style(captions):
    held_out = ["val", "composition", "concept"]
    for i, split in enumerate(held_out):
        assert not captions[split] & captions["train"]
        assert not captions[split] & captions["style"]
        assert not any(captions[split] & captions[other] for other in held_out[i + 1 :])
    assert captions["style"] <= captions["train"]


def test_held_out_captions_are_not_even_keywords_of_train(corpus, captions):
    texts = {caption.text for example in corpus["train"] for caption in example.captions}
    assert not texts & captions["composition"]


def test_no_held_out_picture_is_in_train_under_another_caption(corpus):
    trained = {example.image for example in corpus["train"]}
    for split in ("val", "composition", "concept"):
        assert not trained & {example.image for example in corpus[split]}


def test_every_word_of_composition_is_in_train(captions):
    words = set().union(*map(builder.words_of, captions["train"]))
    for caption in captions["composition"]:
        assert ":" in caption
        assert builder.words_of(caption) <= words


def test_composition_is_a_tenth_of_what_could_be_in_it(captions):
    everything = set().union(*captions.values())
    eligible = [name for name in everything if ":" in name and not name.startswith("flag: ")]
    assert len(eligible) > 1500
    assert len(captions["composition"]) / len(eligible) == pytest.approx(0.10, abs=0.001)


def test_concepts_are_whole_and_neither_starve_nor_are_starved(corpus, captions):
    names = {
        example.key.split("/")[1]: example.captions[0].text
        for part in corpus.values()
        for example in part
    }
    concepts = builder.concepts_of(names)
    assert sum(map(len, concepts)) == len(names)
    held_out = [group for group in concepts if captions["concept"].intersection(group)]
    assert all(captions["concept"].issuperset(group) for group in held_out)
    assert 0.02 < len(held_out) / len(concepts) < 0.04
    assert 0.02 < len(captions["val"]) / len(names) < 0.04
    assert len(captions["train"]) / len(names) > 0.85


def test_flags_are_in_train_and_style_only(corpus):
    for split, part in corpus.items():
        flags = sum(example.metadata["group"] == "Flags" for example in part)
        assert (flags > 200) == (split in ("train", "style"))
        assert flags == MANIFEST["splits"][split]["flags"]
    countries = [e for e in corpus["train"] if e.captions[0].text.startswith("flag: ")]
    assert {example.metadata["style"] for example in countries} == {"noto"}


def test_any_prefix_is_a_fair_sample(corpus):
    start = [example.metadata["style"] for example in corpus["composition"][:128]]
    assert 0.3 < start.count("fluent") / len(start) < 0.65


def tone_orders(pictures: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """For every five-tone set the order of its pictures from the lightest skin to the darkest.

    Skin is where the lightest and darkest pictures of the set differ most: hair, which changes
    colour with the tone, is black in both.
    """
    sets = defaultdict(dict)
    for codepoints, image in pictures.items():
        parts = codepoints.split("-")
        tones = [builder.TONES.index(part) for part in parts if part in builder.TONES]
        if len(tones) == 1:
            name = "-".join("TONE" if part in builder.TONES else part for part in parts)
            sets[name][tones[0]] = image @ LUMINANCE
    orders = {}
    for name, by_tone in sets.items():
        if len(by_tone) == 5:
            stack = np.stack([by_tone[tone] for tone in range(5)])
            difference = np.abs(stack[0] - stack[4])
            skin = stack[:, difference >= 0.6 * difference.max()].mean(axis=1)
            orders[name] = tuple(np.argsort(-skin, stable=True).tolist())
    return orders


@pytest.fixture(scope="module")
def pictures(corpus):
    """Pixels by style and code points."""
    by_style = defaultdict(dict)
    for part in corpus.values():
        for example in part:
            if any(tone in example.key for tone in builder.TONES):
                style, codepoints = example.key.split("/")
                by_style[style][codepoints] = pixels(example)
    return by_style


def test_skin_tones_are_what_the_captions_say(pictures):
    fluent, noto = tone_orders(pictures["fluent"]), tone_orders(pictures["noto"])
    assert (len(fluent), len(noto)) == (297, 317)
    assert [name for name, order in fluent.items() if order != (0, 1, 2, 3, 4)] == []
    assert set(noto.values()) == {(0, 1, 2, 3, 4)}
    twemoji = tone_orders(pictures["twemoji"])
    assert len(twemoji) > 100
    assert set(twemoji.values()) == {(0, 1, 2, 3, 4)}


def test_the_package_names_tones_wrongly(pictures):
    shown = pictures["fluent"]
    named = {name: shown[builder.mend_fluent_tone(name)] for name in shown}
    orders = list(tone_orders(named).values())
    assert orders.count((0, 2, 1, 3, 4)) == 288
    assert orders.count((0, 1, 2, 3, 4)) == 8


# The builder


def test_mend_permutes_the_tones_of_each_set(pictures):
    names = set(pictures["fluent"])
    assert {builder.mend_fluent_tone(name) for name in names} == names


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        ("1f44d-1f3fc", "1f44d-1f3fd"),
        ("1f44d-1f3fd", "1f44d-1f3fc"),
        ("1f44d-1f3fb", "1f44d-1f3fb"),
        ("1f44d", "1f44d"),
        ("1f469-1f3fc-200d-1f4bb", "1f469-1f3fc-200d-1f4bb"),
        ("1f469-1f3fc-200d-1f4bc", "1f469-1f3fd-200d-1f4bc"),
        ("1f46b-1f3fd", "1f46b-1f3fd"),
        ("1f468-1f3fc-200d-2764-200d-1f468-1f3fc", "1f468-1f3fc-200d-2764-200d-1f468-1f3fc"),
        ("1f6b5-1f3fb", "1f6b5-1f3ff"),
        ("1f6b5-1f3fc-200d-2642", "1f6b5-1f3fd-200d-2642"),
    ],
)
def test_mend_of_fluent_names(named, shown):
    assert builder.mend_fluent_tone(named) == shown


@pytest.mark.parametrize(
    ("stem", "codepoints"),
    [("0023-FE0F-20E3", "23-20e3"), ("1f469-1f3fb", "1f469-1f3fb"), ("00a9-fe0f", "a9")],
)
def test_code_points_of_file_names(stem, codepoints):
    assert builder.codepoints_of(stem) == codepoints


def test_concepts_join_tone_gender_and_direction():
    groups = builder.concepts_of(
        {
            "1f9d1-200d-1f3eb": "teacher",
            "1f468-1f3fb-200d-1f3eb": "man teacher: light skin tone",
            "1f3c3": "person running",
            "1f3c3-1f3ff-200d-2640-200d-27a1": "woman running: dark skin tone, facing right",
            "1f9dc": "merperson",
            "1f9dc-200d-2642": "merman",
            "1f469": "woman",
            "1f468-200d-1f9b0": "man: red hair",
            "1f98a": "fox",
        }
    )
    assert sorted(map(len, groups)) == [1, 2, 2, 2, 2]
    assert ["fox"] in groups


word = st.sampled_from(["cook", "pilot", "elf", "red", "blue", "dark", "light"])
phrase = st.lists(word, min_size=1, max_size=3).map(" ".join)
caption = phrase | st.tuples(phrase, phrase).map(": ".join)


@settings(deadline=None)  # the machine may be busy
@given(st.sets(caption, min_size=1, max_size=60), st.data())
def test_split_keeps_its_promises_for_any_captions(names, data):
    keep = data.draw(st.sets(st.sampled_from(sorted(names))))
    split = builder.split_captions({f"{i:x}": name for i, name in enumerate(sorted(names))}, keep)
    assert set(split) == names
    assert all(split[name] == "train" for name in keep)
    train = set().union(*(builder.words_of(n) for n, value in split.items() if value == "train"))
    composition = [name for name, value in split.items() if value == "composition"]
    assert all(":" in name and builder.words_of(name) <= train for name in composition)
    assert len(composition) <= round(0.1 * sum(":" in name for name in names))


def png(color, size=(64, 64), mode="RGBA") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, "PNG")
    return stream.getvalue()


def fake_packages() -> dict[str, dict[str, bytes]]:
    """Forty hands in five tones each, a flag, and files that stand for nothing."""
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    entries, annotations, pictures = [], {}, {}
    for i in range(40):
        base = f"{0x1F400 + i:x}"
        variants = {tone: {"unified": f"{base}-{tone}".upper()} for tone in builder.TONES}
        entry = {"unified": base.upper(), "category": "People & Body", "skin_variations": variants}
        entries.append(entry)
        names = [(base, f"hand {i}")]
        names += [
            (f"{base}-{code}", f"hand {i}: {tone} skin tone")
            for code, tone in zip(builder.TONES, tones, strict=True)
        ]
        for j, (stem, name) in enumerate(names):
            characters = "".join(chr(int(code, 16)) for code in stem.split("-"))
            annotations[characters] = {"default": [name, "fingers"], "tts": [name]}
            pictures[stem] = (i * 6, j * 50, 0, 255)
    entries.append({"unified": "1F1E9-1F1EA", "category": "Flags"})
    annotations["\U0001f1e9\U0001f1ea"] = {"default": ["flag"], "tts": ["flag: Germany"]}
    pictures["1f1e9-1f1ea"] = (1, 2, 3, 255)
    licence = {"package/LICENSE": b"a licence"}
    text = {"annotations": annotations}
    return {
        "@lobehub/fluent-emoji-3d": {
            **{f"package/assets/{stem}.webp": png(c, (32, 40)) for stem, c in pictures.items()},
            "package/assets/1f3f4-e0067e0062.webp": png("red"),  # without a text
        },
        "emoji-datasource-google": {
            **{f"package/img/google/64/{stem}.png": png(c) for stem, c in pictures.items()},
            "package/emoji.json": json.dumps(entries).encode(),
            **licence,
        },
        "emoji-datasource-twitter": {
            f"package/img/twitter/64/{stem}.png": png(c) for stem, c in pictures.items()
        },
        "cldr-annotations-full": {
            "package/annotations/en/annotations.json": json.dumps({"annotations": text}).encode(),
            **licence,
        },
        "cldr-annotations-derived-full": {
            "package/annotationsDerived/en/annotations.json": json.dumps(
                {"annotationsDerived": {"annotations": {}}}
            ).encode()
        },
    }


def test_building_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    packages = fake_packages()
    builder.write_corpus(packages, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train-00000-of-00009.array_record").write_bytes(b"left by another build")
    reversed_files = {name: dict(reversed(files.items())) for name, files in packages.items()}
    manifest = builder.write_corpus(reversed_files, tmp_path / "b")
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 5 + 2 + 5
    assert {p.name for p in (tmp_path / "b").rglob("*.*")} == {p.name for p in files}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    monkeypatch.setattr("capjax.data.sources.EMOJI_DIRECTORY", tmp_path / "b")
    corpus = {split: open_source(f"emoji:{split}") for split in EMOJI_SPLITS}
    assert len(corpus["composition"]) == 2 * round(0.1 * 200)
    held_out = sum(len(corpus[split]) for split in ("val", "composition", "concept"))
    assert len(corpus["train"]) + held_out == 2 * 240 + 1, "a flag of Noto, none of Fluent"
    assert manifest["splits"]["style"]["captions"] == manifest["splits"]["train"]["captions"]
    example = next(e for e in map(corpus["train"].__getitem__, range(99)) if "noto" in e.key)
    assert [caption.text for caption in example.captions[1:]] == ["fingers"]


def test_fluent_pictures_are_taken_for_what_they_show():
    packages = fake_packages()
    shown = builder.read_pictures("fluent", packages)
    folder = "package/assets/"
    named = builder.load_picture(packages["@lobehub/fluent-emoji-3d"][f"{folder}1f400-1f3fc.webp"])
    assert shown["1f400-1f3fd"].tobytes() == named.tobytes()
    assert "1f1e9-1f1ea" not in shown


def test_pictures_lie_on_white_in_a_square():
    image = np.asarray(builder.load_picture(png((255, 0, 0, 255), (32, 64))))
    assert image.shape == (64, 64, 3)
    assert (image[:, :12] == 255).all() and (image[:, -12:] == 255).all()
    assert (image[:, 20:44] == (255, 0, 0)).all()
    clear = np.asarray(builder.load_picture(png((0, 0, 0, 0))))
    assert (clear == 255).all()


def test_shared_pictures_are_never_held_out():
    texts = {str(i): builder.Text(f"name {i}", ()) for i in range(4)}
    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    pictures = {"noto": {"0": red, "1": blue, "2": red}, "fluent": {"1": red}}
    groups = dict.fromkeys("012", "Objects") | {"3": "Flags"}
    assert builder.captions_to_keep(texts, groups, pictures) == {"name 0", "name 2", "name 3"}


def archive_of(members: dict[str, bytes], path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_package_of_another_checksum_is_refused(tmp_path):
    path = tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz"
    archive_of({"package/assets/1f600.webp": b"x"}, path)
    with pytest.raises(UserError, match=r"3d-1\.1\.0\.tgz: sha512 is .*, expected Wlq2lV"):
        builder.fetch("@lobehub/fluent-emoji-3d", tmp_path)


def test_missing_npm_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not installed"):
        builder.fetch("emoji-datasource-google", tmp_path / "cache")


def test_only_what_is_needed_is_read_from_a_package(tmp_path):
    members = {
        "package/img/google/64/1f600.png": b"picture",
        "package/img/google/20/1f600.png": b"small",
        "package/annotations/en/annotations.json": b"{}",
        "package/annotations/en-AU/annotations.json": b"{}",
        "package/LICENSE": b"licence",
    }
    archive_of(members, tmp_path / "a.tgz")
    assert set(builder.read_package(tmp_path / "a.tgz")) == {
        "package/img/google/64/1f600.png",
        "package/annotations/en/annotations.json",
        "package/LICENSE",
    }
