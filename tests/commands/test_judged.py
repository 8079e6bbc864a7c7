"""A judge of random weights: what it says is what its embeddings say."""

import numpy as np
import pytest

from capjax.commands.judged import judge_captions
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.evaluation.measured import read_measured, write_measured
from capjax.evaluation.splits import CaptionRecord
from tests.evaluation.tiny import EIGHT, PREPROCESSING, params, tokenizer, towers

COUNT = 12
RNG = np.random.default_rng(0)
IMAGES = list(RNG.integers(0, 256, (COUNT, 8, 8, 3), np.uint8))
WORDS = ("a", "dark", "thing", "grey", "the", "bright", "of", "them")


def record(number: int, references: tuple[str, ...] = ("a thing", "them")) -> CaptionRecord:
    caption = " ".join(RNG.choice(WORDS, 3))
    return CaptionRecord(
        *(f"k{number}", "here", number, caption, [f"{x} {number // 2}" for x in references]),
        *(False, 0.0, -1.0, 4, 1.0, 0, 3),
    )


RECORDS = [record(number) for number in range(COUNT)]
JUDGE = LoadedModel(towers(), params(), tokenizer(), PREPROCESSING, {}, step=3)


def judged(judge=JUDGE, records=RECORDS, **fields):
    return judge_captions(judge, records, IMAGES, **{"batch_size": 8, "prompt": "a ", **fields})


def test_scores_by_hand():
    found = judged(prompt="the ", w=2.0, bag_sizes=(3,))
    images = JUDGE.embed_images(IMAGES)
    captions = JUDGE.embed_texts([f"the {record.caption}" for record in RECORDS])
    scores = 2 * np.maximum((images * captions).sum(1), 0)
    np.testing.assert_allclose(found.items["clip_score"], scores, atol=1e-6)
    assert np.isclose(found.metrics["clip_score"], scores.mean())
    row = int(scores.argmax())
    references = JUDGE.embed_texts([f"the {text}" for text in RECORDS[row].references])
    best = max(0, (references @ captions[row]).max())
    harmonic = 2 * best * scores[row] / (best + scores[row])
    assert np.isclose(found.items["ref_clip_score"][row], harmonic, atol=1e-6) and harmonic > 0
    assert found.notes["clip_score_w"] == 2 and found.notes["clip_score_prompt"] == "the "
    assert found.notes["clip_score_text_length"] == 8
    cut = sum(tokenizer().count(f"the {record.caption}") > 8 for record in RECORDS)
    assert found.notes["clip_score_cut_captions"] == cut


def test_retrieval_reads_texts_without_the_prompt(tmp_path):
    found, other = judged(bag_sizes=(3,)), judged(bag_sizes=(3,), prompt="", measure="pac_score")
    for name in ("caption_to_image_r1", "bags_3_r1", "image_to_text_r1", "text_to_image_r1"):
        assert found.metrics[name] == other.metrics[name]
    assert other.notes["pac_score_w"] == 2 and "clip_score" not in other.metrics
    similarity = JUDGE.embed_texts([r.caption for r in RECORDS]) @ JUDGE.embed_images(IMAGES).T
    ranks = (similarity >= np.diag(similarity)[:, None] - 1e-7).sum(1)
    np.testing.assert_array_equal(found.items["caption_to_image_rank"], ranks)
    assert found.skipped["rd100_r1"].startswith("12 images")
    assert found.metrics["bags_3_count"] <= 4
    # The two images of a reference, and the two references of an image: each of them will do.
    texts = sorted({text for r in RECORDS for text in r.references})
    own = np.array([[text in r.references for text in texts] for r in RECORDS])
    similarity = JUDGE.embed_images(IMAGES) @ JUDGE.embed_texts(texts).T
    best = np.where(own, similarity, -1)
    others = np.where(own, -1, similarity)
    ranks = 1 + (others >= best.max(1, keepdims=True)).sum(1)
    np.testing.assert_array_equal(found.items["image_to_text_rank"], ranks)
    assert found.items["image_to_text_nearest"].tolist() == [texts[i] for i in others.argmax(1)]
    ranks = 1 + (others >= best.max(0, keepdims=True)).sum(0)
    assert found.metrics["text_to_image_r5"] == (ranks <= 5).mean()
    write_measured(tmp_path / "val.json", found)
    again = read_measured(tmp_path / "val.json")
    assert again.metrics == found.metrics and again.keys == found.keys
    assert again.items["nearest_key"].tolist() == found.items["nearest_key"].tolist()


def test_a_prompt_that_leaves_no_room():
    found = judged(prompt="A photo depicts ", bag_sizes=(3,))
    assert "of the 8 tokens that the judge reads are the prompt" in found.skipped["clip_score"]
    assert "clip_score" not in found.metrics and "caption_to_image_r1" in found.metrics


def test_a_mesh_gives_the_same():
    one, eight = judged(bag_sizes=(3,)), judged(JUDGE.on_mesh(EIGHT), bag_sizes=(3,))
    assert one.metrics.keys() == eight.metrics.keys()
    for name, value in one.metrics.items():
        np.testing.assert_allclose(eight.metrics[name], value, rtol=1e-5, err_msg=name)


def test_without_references():
    found = judged(records=[r._replace(references=[]) for r in RECORDS], bag_sizes=())
    assert found.skipped["ref_clip_score"] == "no references"
    assert found.skipped["image_to_text_r1"] == "some images have no reference"
    some = judged(records=[RECORDS[0]._replace(references=[]), *RECORDS[1:]], bag_sizes=())
    assert np.isnan(some.items["ref_clip_score"][0])
    assert some.metrics["ref_clip_score"] == pytest.approx(
        some.items["ref_clip_score"][1:].mean(), rel=1e-6
    )


def test_what_cannot_be_judged():
    with pytest.raises(UserError, match="11 captions for 12 images"):
        judged(records=RECORDS[1:])
    with pytest.raises(UserError, match="measure='spice': choose one of clip_score, pac_score"):
        judged(measure="spice")
    with pytest.raises(UserError, match=r"no caption for \['z'\]"):
        judged(bags_of={2: [["k0", "z"]]})
