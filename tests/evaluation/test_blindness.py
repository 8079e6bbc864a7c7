"""The monitor of image-blind captioners, on metrics of runs and on ones that it must warn of."""

import pytest

from capjax.evaluation.blindness import blindness

# (loss, shuffled_images_loss, distinct_ratio) of a captioner of the embedded corpus.
HEALTHY = {
    "concept, step 400": (5.017, 5.378, 0.492),
    "composition, step 400": (1.022, 1.787, 0.516),
    "style, at the end": (0.987, 3.379, 0.474),
}


def metrics(loss, shuffled, distinct):
    return {"loss": loss, "shuffled_images_loss": shuffled, "distinct_ratio": distinct}


@pytest.mark.parametrize("name", HEALTHY)
def test_silent_about_captioners_that_look(name):
    assert blindness(metrics(*HEALTHY[name])) == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((2.0, 2.0, 0.008), "ignores its images"),
        ((2.0, 2.01, 0.9), "ignores its images"),
        ((2.0, 1.9, 0.9), "ignores its images"),
        ((1.0, 2.0, 0.008), "says the same of most images: 0.80%"),
    ],
)
def test_warns(given, said):
    assert blindness(metrics(*given)).startswith(said)


def test_few_different_references_allow_few_different_captions():
    given = metrics(1.0, 2.0, 0.02)
    assert blindness(given)
    assert blindness(given, references_distinct_ratio=0.025) == ""


def test_silent_where_the_metrics_cannot_tell():
    assert blindness({}) == ""
    assert blindness({"loss": 2.0, "shuffled_images_loss": 0.0}) == ""  # one row a batch
    assert blindness({"loss": float("nan"), "shuffled_images_loss": float("nan")}) == ""
