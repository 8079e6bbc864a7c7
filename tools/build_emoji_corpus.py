"""Builds the embedded emoji corpus (capjax/data/emoji) from five pinned npm packages.

    python tools/build_emoji_corpus.py --cache=/tmp/emoji-packages

Pictures: Fluent 3D, Noto and Twemoji at 64 x 64 RGB. Texts: the English short names (`tts`, the
caption) and keywords of Unicode CLDR. The same packages give the same bytes. What the splits mean
is said in tools/emoji_corpus/README.md, which becomes the README beside the data.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import PIL
from PIL import Image, features

from capjax.data.records import SHARD_SUFFIX, Caption, Example, write_shards
from capjax.data.sources import EMOJI_DIRECTORY, EMOJI_SPLITS
from capjax.errors import UserError

Files = Mapping[str, bytes]  # the members of a package, by path


class Package(NamedTuple):
    """An npm package at one version, and the sha512 of its archive (base64, as npm gives it)."""

    version: str
    sha512: str


PACKAGES = {
    "@lobehub/fluent-emoji-3d": Package(
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "emoji-datasource-google": Package(
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    "emoji-datasource-twitter": Package(
        "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
    "cldr-annotations-full": Package(
        "48.2.0",
        "DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
    ),
    "cldr-annotations-derived-full": Package(
        "48.2.0",
        "log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT83Ke8TchEfnwI9cIk2P31zO4nTvZmw==",
    ),
}
# style: (package, folder of the pictures)
PICTURES = {
    "fluent": ("@lobehub/fluent-emoji-3d", "package/assets/"),
    "noto": ("emoji-datasource-google", "package/img/google/64/"),
    "twemoji": ("emoji-datasource-twitter", "package/img/twitter/64/"),
}
FLAGS = "Flags"
# The order of Unicode's emoji charts; an example's label is the index in it.
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    FLAGS,
    "Component",
)
TEMPLATES = Path(__file__).parent / "emoji_corpus"  # README and notices that no package holds
SIZE = 64
QUALITY = 60  # the best round figure that keeps all within 10 MB
CONCEPT_FRACTION, VAL_FRACTION, COMPOSITION_FRACTION = 0.03, 0.03, 0.10
CONCEPT_CAPTIONS = 20  # a larger concept (`family`, `person`) is never held out: train needs it

JOINER, MALE, FEMALE, RIGHTWARDS = "200d", "2642", "2640", "27a1"
TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")  # light … dark
REGIONAL = re.compile("1f1(e[6-9a-f]|f)")  # the letters that spell the codes of countries
PEOPLE = {"1f468", "1f469", "1f9d1"}  # man, woman, person
# Fluent sets whose medium-light and medium pictures are named rightly.
RIGHT_COUPLES = {"1f491", "1f46b", "1f46c", "1f46d", "1f48f"}
MOUNTAIN_BIKER = "1f6b5"  # a set in an order of its own
GENDER_WORDS = {"man", "men", "woman", "women", "person", "people", "and"}


# Packages


def fetch(name: str, cache: Path) -> Path:
    """The archive of a package from `cache`, downloaded by npm if absent; its sha512 is checked."""
    package = PACKAGES[name]
    archive = cache / f"{name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{name}@{package.version}", "--pack-destination", str(cache)]
        try:
            subprocess.run([*command, "--silent"], check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError("npm is not installed: it downloads the emoji packages") from error
        except subprocess.CalledProcessError as error:
            raise UserError(f"`{' '.join(command)}` failed: {error.stderr[-300:]}") from error
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise UserError(
            f"{archive}: sha512 is {digest}, expected {package.sha512}; delete the file"
        )
    return archive


def read_package(archive: Path) -> Files:
    """The members of an archive that the corpus is made from."""
    wanted = re.compile(
        r"package/(emoji\.json|LICENSE|assets/.*|img/(google|twitter)/64/.*"
        r"|annotations(Derived)?/en/annotations\.json)"
    )
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile() and wanted.fullmatch(member.name)]
        return {member.name: tar.extractfile(member).read() for member in members}  # type: ignore


# Names and texts


def join_codes(codes: Iterable[int]) -> str:
    """`1f9d1-1f3fb`: the code points without the variation selector, which sources use at will."""
    return "-".join(f"{code:x}" for code in codes if code != 0xFE0F)


def codepoints_of(stem: str) -> str:
    """The code points that a file name such as `0023-FE0F-20E3` stands for."""
    return join_codes(int(part, 16) for part in stem.split("-"))


class Text(NamedTuple):
    """What CLDR says of one emoji."""

    caption: str
    keywords: tuple[str, ...]


def read_texts(packages: Mapping[str, Files]) -> dict[str, Text]:
    """Caption and keywords by code points, for every emoji that CLDR names."""
    texts = {}
    for name, folder in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        content = json.loads(packages[name][f"package/{folder}/en/annotations.json"])
        for characters, entry in content[folder]["annotations"].items():
            if entry.get("tts"):
                caption = entry["tts"][0]
                keywords = tuple(word for word in entry.get("default", ()) if word != caption)
                texts[join_codes(map(ord, characters))] = Text(caption, keywords)
    return texts


def read_groups(packages: Mapping[str, Files]) -> dict[str, str]:
    """The group of every emoji and tone variant, by code points."""
    entries = json.loads(packages["emoji-datasource-google"]["package/emoji.json"])
    return {
        codepoints_of(variant["unified"]): entry["category"]
        for entry in entries
        for variant in (entry, *entry.get("skin_variations", {}).values())
    }


def mend_fluent_tone(codepoints: str) -> str:
    """What a Fluent 3D picture shows, given the code points it is named by.

    The package names medium-light (1f3fc) and medium (1f3fd) the wrong way round, except in the
    couples and technologists. tests/data/test_emoji_corpus.py measures the skin.
    """
    parts = codepoints.split("-")
    tones = [part for part in parts if part in TONES]
    couple = parts[0] in RIGHT_COUPLES or len(tones) == 2
    technologist = parts[0] in PEOPLE and parts[2:] == [JOINER, "1f4bb"]
    if not tones or couple or technologist:
        return codepoints
    shown = dict(zip(TONES, (TONES[i] for i in (0, 2, 1, 3, 4)), strict=True))
    if parts[0] == MOUNTAIN_BIKER and len(parts) == 2:
        shown = dict(zip(TONES, (TONES[i] for i in (4, 2, 3, 1, 0)), strict=True))
    return "-".join(shown.get(part, part) for part in parts)


# Pictures


def load_picture(data: bytes) -> Image.Image:
    """Decodes to SIZE x SIZE RGB on white, widened to a square where it is not one."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def encode_picture(image: Image.Image) -> bytes:
    """WebP, the smallest that every supported Pillow reads."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=QUALITY, method=6)
    return stream.getvalue()


def read_pictures(style: str, packages: Mapping[str, Files]) -> dict[str, Image.Image]:
    """The pictures of a style by the code points of what they show."""
    name, folder = PICTURES[style]
    pictures = {}
    for path in sorted(packages[name]):  # of two pictures of one emoji the later name wins
        if not path.startswith(folder):
            continue
        codepoints = codepoints_of(Path(path).stem)
        if style == "fluent":
            if REGIONAL.match(codepoints):
                continue  # country flags: not Microsoft's, of unknown licence
            codepoints = mend_fluent_tone(codepoints)
        pictures[codepoints] = load_picture(packages[name][path])
    return pictures


# Splits


def rank(salt: str, text: str) -> str:
    """A hash to order by: stable, and independent for every salt."""
    return hashlib.sha256(f"{salt}\0{text}".encode()).hexdigest()


def words_of(caption: str) -> set[str]:
    """The words of a caption in lower case; `medium-light` is one word."""
    return set(re.sub("[:,]", " ", caption.lower()).split())


def concepts_of(captions: Mapping[str, str]) -> list[list[str]]:
    """Groups captions that differ only in tone, gender, hair or direction.

    `captions` maps code points to caption. Two captions belong together if their code points agree
    without tone, gender and direction, or their texts before the colon without words of gender.
    """
    concept: dict[str, str] = {}  # union-find over both kinds of name

    def root(name: str) -> str:
        while concept.setdefault(name, name) != name:
            name = concept[name]
        return name

    for codepoints, caption in sorted(captions.items()):
        parts = [part for part in codepoints.split("-") if part not in TONES]
        base = "-".join("1f9d1" if part in PEOPLE else part for part in parts)
        base = re.sub(f"-{JOINER}-({MALE}|{FEMALE}|{RIGHTWARDS})", "", base)
        words = caption.split(":")[0].lower().split()
        stem = " ".join(word for word in words if word not in GENDER_WORDS) or "person"
        concept[root(f"code {base}")] = root(f"text {stem}")
        concept[root(f"caption {caption}")] = root(f"text {stem}")
    groups = defaultdict(list)
    for caption in sorted(captions.values()):
        groups[root(f"caption {caption}")].append(caption)
    return sorted(groups.values())


def split_captions(captions: Mapping[str, str], keep: set[str]) -> dict[str, str]:
    """Assigns every caption to train, val, composition or concept; those of `keep` to train.

    A caption goes to `composition` only while each of its words stays in some train caption, so
    the rule holds for all of them at the end.
    """
    split = dict.fromkeys(captions.values(), "train")
    free = [
        group
        for group in concepts_of(captions)
        if not keep.intersection(group) and len(group) <= CONCEPT_CAPTIONS
    ]
    free.sort(key=lambda group: rank("concept", group[0]))
    for group in free[: round(CONCEPT_FRACTION * len(free))]:
        split.update(dict.fromkeys(group, "concept"))

    def candidates(salt: str) -> list[str]:
        names = [name for name, value in split.items() if value == "train" and name not in keep]
        return sorted(names, key=lambda name: rank(salt, name))

    names = candidates("val")
    split.update(dict.fromkeys(names[: round(VAL_FRACTION * len(names))], "val"))
    counts = Counter(
        word for name, value in split.items() if value == "train" for word in words_of(name)
    )
    eligible = sum(":" in name and not name.startswith("flag: ") for name in split)
    wanted = round(COMPOSITION_FRACTION * eligible)
    for name in candidates("composition"):
        words = words_of(name)
        if wanted and ":" in name and all(counts[word] > 1 for word in words):
            counts.subtract(words)
            split[name] = "composition"
            wanted -= 1
    return split


def captions_to_keep(
    texts: Mapping[str, Text],
    groups: Mapping[str, str],
    pictures: Mapping[str, Mapping[str, Image.Image]],
) -> set[str]:
    """Captions never held out: flags, swatches, and those that share their very picture."""
    keep = {texts[code].caption for code in texts if groups.get(code) in (FLAGS, "Component")}
    for of_style in pictures.values():
        same = defaultdict(set)
        for codepoints, image in of_style.items():
            same[image.tobytes()].add(texts[codepoints].caption)
        keep.update(*(names for names in same.values() if len(names) > 1))
    return keep


# The corpus


def make_examples(packages: Mapping[str, Files]) -> dict[str, list[Example]]:
    """All examples by split, in a hashed order: any prefix of a split is a fair sample of it."""
    texts, groups = read_texts(packages), read_groups(packages)
    pictures = {
        style: {
            codepoints: image
            for codepoints, image in read_pictures(style, packages).items()
            if codepoints in texts  # Fluent has three flags under broken names
        }
        for style in PICTURES
    }
    captions = {
        codepoints: texts[codepoints].caption
        for of_style in pictures.values()
        for codepoints in of_style
    }
    split = split_captions(captions, captions_to_keep(texts, groups, pictures))
    examples: dict[str, list[Example]] = {name: [] for name in EMOJI_SPLITS}
    for style, of_style in pictures.items():
        for codepoints, image in of_style.items():
            caption, keywords = texts[codepoints]
            target = split[caption]
            if style == "twemoji":
                if target != "train":
                    continue  # then the style is the only novelty of the `style` split
                target = "style"
            example = Example(
                key=f"{style}/{codepoints}",
                image=encode_picture(image),
                captions=(
                    Caption(caption, "tts"),
                    *(Caption(keyword, "keyword") for keyword in keywords),
                ),
                label=GROUPS.index(groups[codepoints]),
                metadata={"style": style, "group": groups[codepoints]},
            )
            examples[target].append(example)
    return {
        name: sorted(part, key=lambda example: rank("order", example.key))
        for name, part in examples.items()
    }


def count(examples: list[Example]) -> dict[str, object]:
    """The figures of a split for the manifest."""
    return {
        "examples": len(examples),
        "captions": len({example.captions[0].text for example in examples}),
        "flags": sum(example.metadata["group"] == FLAGS for example in examples),
        "styles": dict(sorted(Counter(example.metadata["style"] for example in examples).items())),
    }


def write_corpus(packages: Mapping[str, Files], output: Path) -> dict[str, object]:
    """Writes shards, manifest, README and licences to `output`; returns the manifest."""
    examples = make_examples(packages)
    shards = {}
    for split, part in examples.items():
        for path in write_shards(part, output, split, shard_size=len(part) or 1):
            content = path.read_bytes()
            shards[path.name] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "examples": len(part),
            }
    for path in output.glob(f"*{SHARD_SUFFIX}"):
        if path.name not in shards:
            path.unlink()  # left by an earlier build under another name
    manifest: dict[str, object] = {
        "packages": {name: package._asdict() for name, package in PACKAGES.items()},
        "image": {"size": SIZE, "format": "webp", "quality": QUALITY},
        "built_with": {"pillow": PIL.__version__, "libwebp": features.version("webp")},
        "groups": list(GROUPS),
        "splits": {split: count(part) for split, part in examples.items()},
        "shards": shards,
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    readme = (TEMPLATES / "README.md").read_text("utf-8").format(table=counts_table(examples))
    (output / "README.md").write_text(readme, "utf-8")
    write_licences(packages, output / "LICENSES")
    return manifest


def counts_table(examples: Mapping[str, list[Example]]) -> str:
    """The splits as rows of a Markdown table."""
    rows = []
    for split, part in examples.items():
        figures = count(part)
        styles = Counter(example.metadata["style"] for example in part)
        cells = [split, *(styles[style] or "" for style in PICTURES)]
        rows.append([*cells, figures["examples"], figures["captions"], figures["flags"]])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def write_licences(packages: Mapping[str, Files], directory: Path) -> None:
    """Writes the licence of every source: from its package where it is there."""
    directory.mkdir(exist_ok=True)
    for name, package in (
        ("Unicode-3.0.txt", "cldr-annotations-full"),
        ("MIT-emoji-datasource.txt", "emoji-datasource-google"),
    ):
        (directory / name).write_bytes(packages[package]["package/LICENSE"])
    for name in ("MIT-fluentui-emoji.txt", "CC-BY-4.0-twemoji.txt"):
        shutil.copyfile(TEMPLATES / name, directory / name)
    # capjax is under the same licence as Noto's pictures, so its own copy serves.
    shutil.copyfile(Path(__file__).parents[1] / "LICENSE", directory / "Apache-2.0-noto-emoji.txt")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the embedded emoji corpus.")
    parser.add_argument("--cache", type=Path, required=True, help="where the packages are kept")
    parser.add_argument("--output", type=Path, default=EMOJI_DIRECTORY)
    args = parser.parse_args()
    try:
        packages = {name: read_package(fetch(name, args.cache)) for name in PACKAGES}
    except UserError as error:
        print(f"build_emoji_corpus: {error}", file=sys.stderr)
        return 2
    manifest = write_corpus(packages, args.output)
    print(json.dumps(manifest["splits"], indent=1))
    total = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{total:,} bytes in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
