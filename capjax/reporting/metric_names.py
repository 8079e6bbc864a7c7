"""What a metric is called on a page, which others it stands with, and which way is better."""

import re
from typing import NamedTuple

GROUPS = (
    "Agreement with the references",
    "Without references",
    "Retrieval",
    "Diversity and length",
    "Hallucination",
    "Representation",
    "Composition",
    "Loss",
    "Other",
)
REFERENCE_BASED = ("cider_d", "cider_plain", "bleu_4", "meteor", "rouge_l", "spice", "unigram_f1")
REFERENCE_FREE = (
    "caption_to_image_r1",
    "rd100_r1",
    "clip_score",
    "pac_score",
    "self_cider",
    "distinct_ratio",  # the last two need no judge
    "vocabulary_size",
)
_COUNTS = ("retrieval_images", "retrieval_captions", "num_images", "num_captions")


class Named(NamedTuple):
    """better: 1 where more is better, -1 where less is, 0 where neither."""

    title: str
    group: str
    better: int
    order: tuple[int, ...] = ()


# A whole name, its title (groups of the pattern filled in), group and direction; the first that
# matches counts.
_PATTERNS = [
    (re.compile(pattern), title, group, better)
    for group, rows in {
        "Loss": (
            (r"loss", "loss (nats a token)", -1),
            (r"caption_loss", "caption loss (nats a token)", -1),
            (r"parallel_loss", "parallel loss (nats a token)", -1),
            (r"contrastive_loss", "contrastive loss", -1),
            (r"shuffled_images_loss", "loss with shuffled images", 0),
            (r"(.*)perplexity", r"\1perplexity", -1),
            (r"logprob", "log-probability", 1),
            (r"(.*)loss", r"\1loss (nats a token)", -1),
            (r"(.*)caption_nats", r"\1nats a caption", -1),
        ),
        "Agreement with the references": (
            (r"cider_d", "CIDEr-D", 1),
            (r"cider_plain", "CIDEr without clipping", 1),
            (r"spice", "SPICE", 1),
            (r"meteor", "METEOR", 1),
            (r"bleu_(\d)", r"BLEU-\1", 1),
            (r"rouge_l", "ROUGE-L", 1),
            (r"exact_match", "exact match", 1),
            (r"unigram_f1", "unigram F1", 1),
        ),
        "Without references": (
            (r"clip_score", "CLIPScore", 1),
            (r"ref_clip_score", "RefCLIPScore", 1),
            (r"pac_score", "PAC-S", 1),
            (r"ref_pac_score", "RefPAC-S", 1),
        ),
        "Retrieval": (
            (r"caption_to_image_r(\d+)", r"caption to image R@\1", 1),
            (r"rd100_r(\d+)", r"RD100 R@\1", 1),
            (r"rd100_r(\d+)_ties_as_hits", r"RD100 R@\1, ties as hits", 0),
            (r"bags_(\d+)_r(\d+)", r"bags of \1, R@\2", 1),
            (r"imagecode_r(\d+)", r"ImageCoDe R@\1", 1),
            (r"image_to_text_r(\d+)", r"image to text R@\1", 1),
            (r"text_to_image_r(\d+)", r"text to image R@\1", 1),
            (r"bags_(\d+)_r(\d+)_ties_as_hits", r"bags of \1, R@\2, ties as hits", 0),
            (r"bags_(\d+)_count", r"bags of \1, how many", 0),
            (r"(.*)_r(\d+)_ties_as_hits", r"\1 R@\2, ties as hits", 0),
            (r"(?:(.*)_)?r_precision", r"\1 R-Precision", 1),
            (r"(?:(.*)_)?map_at_r", r"\1 mAP@R", 1),
            (r"(.*)_r(\d+)", r"\1 R@\2", 1),
            (r"(.*)_rank", r"\1 rank", -1),
            (r"(.*)_tie_rate", r"\1 tie rate", -1),
            (r"retrieval_(.*)", r"number of \1", 0),
        ),
        "Diversity and length": (
            (r"self_cider", "self-CIDEr", 1),
            (r"mbleu_(\d)", r"mBLEU-\1", -1),
            (r"div_(\d)", r"Div-\1", 1),
            (r"distinct_ratio", "distinct captions", 1),
            (r"vocabulary_size", "vocabulary", 0),
            (r"num_words", "words a caption", 0),
            (r"num_tokens", "tokens a caption", 0),
        ),
        "Hallucination": (
            (r"chair_i", "CHAIRi", -1),
            (r"chair_s", "CHAIRs", -1),
            (r"mention_(precision|recall)", r"\1 of what is named", 1),
            (r"(.*)_(precision|recall)", r"\1 \2", 1),
            (r"num_mentions", "things named", 0),
            (r"num_hallucinated", "things named that are not there", -1),
        ),
        "Representation": (
            (r"majority_top1", "always the commonest class, top 1", 0),
            (r"majority_class_mean", "always the commonest class, mean over classes", 0),
            (r"knn_top(\d+)", r"k-NN, top \1", 1),
            (r"knn_class_mean", "k-NN, mean over classes", 1),
            (r"linear_probe_top(\d+)", r"linear probe, top \1", 1),
            (r"linear_probe_class_mean", "linear probe, mean over classes", 1),
            (r"fewshot_(\d+)_top(\d+)", r"\1-shot, top \2", 1),
            (r"fewshot_(\d+)_class_mean", r"\1-shot, mean over classes", 1),
            (r"zeroshot_prior_top(\d+)", r"zero-shot without the image, top \1", 0),
            (r"zeroshot_prior_class_mean", "zero-shot without the image, mean over classes", 0),
            (r"zeroshot_top(\d+)", r"zero-shot, top \1", 1),
            (r"zeroshot_class_mean", "zero-shot, mean over classes", 1),
            (r"zeroshot_likelihood_top(\d+)", r"zero-shot by likelihood, top \1", 1),
            (r"zeroshot_likelihood_class_mean", "zero-shot by likelihood, mean over classes", 1),
            (r"zeroshot_(.*)_top(\d+)", r"zero-shot by \1, top \2", 1),
            (r"zeroshot_(.*)_class_mean", r"zero-shot by \1, mean over classes", 1),
            (r"(.*)_class_mean", r"\1, mean over classes", 1),
            (r"(.*)_top(\d+)", r"\1, top \2", 1),
        ),
        "Composition": (
            (r"(.*?)_(text|image|group)_null_image", r"\1, \2, without the image", 0),
            (r"(.*?)_(text|image|group)", r"\1, \2", 1),
            (r"(.*?)_(text|image|group)_(.*)", r"\1, \2, \3", 1),
        ),
    }.items()
    for pattern, title, better in rows
]


def named(metric: str) -> Named:
    """How `metric` is shown. A name that no rule knows is its own title, in "Other"."""
    for place, (pattern, title, group, better) in enumerate(_PATTERNS):
        if match := pattern.fullmatch(metric):
            place = 0 if group == "Composition" else place  # its figures stand side by side
            return Named(
                match.expand(title).replace("_", " ").strip(),
                group,
                better,
                (GROUPS.index(group), place),
            )
    return Named(metric.replace("_", " "), "Other", 0, (len(GROUPS),))


def in_order(metrics) -> list[str]:
    """Metrics as a page lists them: by group, then by rule, then by name, numbers as numbers."""

    def place(metric: str) -> tuple:
        digits = tuple(int(number) for number in re.findall(r"\d+", metric))
        return (*named(metric).order, digits, metric)

    return sorted(metrics, key=place)


def is_count(metric: str) -> bool:
    """Whether it says how much was measured, not what was found."""
    return metric in _COUNTS
