"""What a checkpoint's images and texts are worth for classification, in one function."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath
from jax.sharding import Mesh

from capjax.data.captions import clean_text
from capjax.data.sources import EMOJI_DIRECTORY, SOURCE_NAMES, Source
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.evaluation.every_row import NO_LABEL, ImageRows
from capjax.evaluation.features import frozen_features
from capjax.evaluation.fewshot import SHOTS, draw_shots, least_squares
from capjax.evaluation.intervals import Statistic, intervals, mean_of
from capjax.evaluation.knn import knn_scores
from capjax.evaluation.linear_probe import PENALTIES, train_linear_probe
from capjax.evaluation.measured import Measured, join
from capjax.evaluation.zeroshot import ClassTexts, class_embeddings, likelihoods, prompts
from capjax.mesh import MeshShape, make_mesh

ClassNames = Sequence[str | Sequence[str]]
Opened = tuple[str, Source]  # what was opened, and the source


def represent(
    loaded: LoadedModel,
    train: Opened,
    test: Opened,
    class_names: ClassNames,
    *,
    templates: Sequence[str] = ("{}",),
    kind: str = "patch_mean",
    directory: epath.Path | None = None,
    batch_size: int = 128,
    max_examples: int | None = None,
    max_train_examples: int | None = None,
    shots: Sequence[int] = SHOTS,
    num_seeds: int = 3,
    k: int = 20,
    penalties: Sequence[float] = PENALTIES,
) -> Measured:
    """k-NN, linear probe and few-shot on frozen features, and zero-shot as the model allows.

    Args:
      class_names: of label 0, 1, ...: a name, or several that mean the same.
      templates: of the prompts, "{}" standing for the name.
      kind: the feature, one of `features.KINDS`.
      directory: where features are kept; None: nowhere.
      max_examples, max_train_examples: of `test` and of `train`, evenly spread; None for all.
      penalties: of the linear probe, to choose from.

    Every way of classifying has `<way>_top1`, with an item for each test example, and
    `<way>_class_mean`: the mean over the test set's classes of top-1, for which a rare class counts
    as much as a common one. The way "majority" always says the most frequent class of training.
    Examples without a label are left out. Every process returns the same.

    Raises `UserError` for labels beyond the names, and where no example has a label.
    """
    mesh = loaded.mesh or make_mesh(MeshShape())
    loaded = loaded if loaded.mesh else loaded.on_mesh(mesh)

    def features(source: Opened, kind: str, most: int | None = max_examples) -> ImageRows:
        found = frozen_features(
            loaded.towers,
            loaded.params,
            source,
            loaded.preprocessing,
            mesh=mesh,
            kind=kind,
            batch_size=batch_size,
            max_examples=most,
            directory=directory,
        )
        return _labelled(source[0], found, len(class_names))

    known, rows = features(train, kind, max_train_examples), features(test, kind)
    parts = {
        "sets": Measured({}, notes={"train": train[0], "test": test[0], "feature": kind}),
        "majority": _majority(known, rows),
        "knn": _knn(known, rows, len(class_names), mesh, k),
        "linear_probe": _linear_probe(known, rows, len(class_names), mesh, penalties),
        "fewshot": _fewshot(known, rows, len(class_names), shots, num_seeds),
    }
    texts = prompts(class_names, templates)
    if loaded.towers.embedder is None:
        reason = "the checkpoint holds no contrastive towers"
        parts["towers"] = Measured({}, skipped={"zeroshot_top1": reason})
    else:
        parts["towers"] = _by_towers(loaded, mesh, features(test, "embedding"), texts)
    if loaded.towers.generator is None:
        reason = "the checkpoint holds no caption decoder"
        parts["likelihood"] = Measured({}, skipped={"zeroshot_likelihood_top1": reason})
    else:
        found, priors_C = likelihoods(
            loaded.model,
            loaded.params,
            test[1],
            loaded.preprocessing,
            _tokens(loaded, texts.texts, loaded.model.config.text_length),
            texts.class_T,
            mesh=mesh,
            batch_size=batch_size,
            max_examples=max_examples,
        )
        rows = _labelled(test[0], found, len(class_names))
        parts["likelihood"] = _by_likelihood(rows, priors_C, loaded.has_null_image)
    joined = join(parts)
    return joined._replace(notes={"represent": joined.notes | {"templates": list(templates)}})


def label_names(source: str, file: str = "") -> list[str]:
    """The names of the labels of a source: the lines of `file`; the embedded corpus knows its own.

    Raises `UserError` where there are none.
    """
    if file:
        try:
            names = Path(file).expanduser().read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: expected a text file, a class a line ({error})") from error
        if not all(name.strip() for name in names) or not names:
            raise UserError(f"{file}: expected the name of a class in every line")
        return names
    if source.partition("?")[0] not in SOURCE_NAMES:
        raise UserError(
            f"{source!r} does not say what its labels mean: give a file with the name of a class "
            "a line, label 0 first"
        )
    return json.loads((EMOJI_DIRECTORY / "manifest.json").read_text("utf-8"))["groups"]


def _labelled(name: str, rows: ImageRows, num_classes: int) -> ImageRows:
    """The rows that have a label. Raises `UserError`."""
    kept = np.flatnonzero(rows.labels_N != NO_LABEL)
    labels_N = rows.labels_N[kept]
    if not len(kept):
        raise UserError(f"{name}: none of its {len(rows.keys)} examples has a label")
    if labels_N.min() < 0 or labels_N.max() >= num_classes:
        raise UserError(
            f"{name} has labels from {labels_N.min()} to {labels_N.max()}: expected 0 to "
            f"{num_classes - 1}, as there are {num_classes} names of classes"
        )
    keys = tuple(rows.keys[i] for i in kept)
    return rows._replace(values=rows.values[kept], labels_N=labels_N, keys=keys)


def _measured(way: str, predicted_SN: np.ndarray, rows: ImageRows, **notes) -> Measured:
    """Of S runs' predictions [S, N], or those of one run [N]: the mean over the runs."""
    is_right_N = (np.atleast_2d(predicted_SN) == rows.labels_N).mean(0)
    statistics = {
        f"{way}_top1": mean_of(is_right_N),
        f"{way}_class_mean": _class_mean(is_right_N, rows.labels_N),
    }
    return Measured(
        {name: statistic.value for name, statistic in statistics.items()},
        {f"{way}_top1": is_right_N},
        rows.keys,
        intervals(statistics),
        notes={way: notes} if notes else {},
    )


def _class_mean(is_right_N: np.ndarray, labels_N: np.ndarray) -> Statistic:
    """The mean over the classes that there are of the share of each that is right."""
    is_class_NC = labels_N[:, None] == np.unique(labels_N)
    rows = np.concatenate([is_class_NC * is_right_N[:, None], is_class_NC], axis=1)

    def of_sums(sums: np.ndarray) -> np.ndarray | np.floating:
        right, count = np.split(sums, 2, axis=-1)
        return (right / np.maximum(count, 1)).sum(-1) / (count > 0).sum(-1)

    return Statistic(rows, of_sums)


def _majority(known: ImageRows, rows: ImageRows) -> Measured:
    label = np.bincount(known.labels_N).argmax()
    sizes = {"train_examples": len(known.keys), "test_examples": len(rows.keys)}
    unreadable = known.unreadable + rows.unreadable
    predicted_N = np.full(len(rows.keys), label)
    return _measured("majority", predicted_N, rows, **sizes, unreadable=unreadable)


def _knn(known: ImageRows, rows: ImageRows, num_classes: int, mesh: Mesh, k: int) -> Measured:
    scores_NC = knn_scores(known.values, known.labels_N, rows.values, num_classes, mesh=mesh, k=k)
    return _measured("knn", scores_NC.argmax(1), rows, k=k)


def _linear_probe(
    known: ImageRows, rows: ImageRows, num_classes: int, mesh: Mesh, penalties: Sequence[float]
) -> Measured:
    probe = train_linear_probe(
        known.values,
        known.labels_N,
        num_classes,
        mesh=mesh,
        units=_units(known.keys),
        penalties=penalties,
    )
    predicted_N = probe.scores(rows.values).argmax(1)
    tried = {f"{penalty:.3g}": top1 for penalty, top1 in probe.held_out_top1.items()}
    return _measured("linear_probe", predicted_N, rows, penalty=probe.penalty, held_out_top1=tried)


def _units(keys: Sequence[str]) -> list[str]:
    """What follows the last "/" of each key, which drawings of one thing share; or the keys.

    Where most keys end alike their ends name nothing.
    """
    ends = [key.rpartition("/")[2] for key in keys]
    return ends if 2 * len(set(ends)) >= len(set(keys)) else list(keys)


def _fewshot(
    known: ImageRows, rows: ImageRows, num_classes: int, shots: Sequence[int], num_seeds: int
) -> Measured:
    predicted: dict[int, list[np.ndarray]] = {count: [] for count in shots}
    for seed in range(num_seeds):
        for count, drawn in draw_shots(known.labels_N, num_classes, shots, seed).items():
            solved = least_squares(known.values[drawn], known.labels_N[drawn], num_classes)
            predicted[count].append(solved.scores(rows.values).argmax(1))
    sizes_C = np.bincount(known.labels_N, minlength=num_classes)
    return join(
        {
            str(count): _measured(
                f"fewshot_{count}",
                np.stack(predicted_SN),
                rows,
                seeds=[
                    float((predicted_N == rows.labels_N).mean()) for predicted_N in predicted_SN
                ],
                classes_with_fewer=int((sizes_C < count).sum()),
            )
            for count, predicted_SN in predicted.items()
        }
    )


def _by_towers(loaded: LoadedModel, mesh: Mesh, rows: ImageRows, texts: ClassTexts) -> Measured:
    embedder = loaded.embedder
    class_CD = class_embeddings(
        embedder,
        loaded.params,
        _tokens(loaded, texts.texts, embedder.config.text_length),
        texts.class_T,
        mesh=mesh,
    )
    return _measured("zeroshot", (rows.values @ class_CD.T).argmax(1), rows)


def _by_likelihood(rows: ImageRows, priors_C: np.ndarray, has_null_image: bool) -> Measured:
    way = "zeroshot_likelihood"
    plain = _measured(way, rows.values[:, 0].argmax(1), rows)
    if not has_null_image:
        reason = "the model was not trained without image (image_dropout)"
        return plain._replace(skipped={f"{way}_minus_prior_top1": reason})
    corrected = _measured(f"{way}_minus_prior", rows.values[:, 1].argmax(1), rows)
    blind_N = np.full(len(rows.keys), priors_C.argmax())
    blind = _measured("zeroshot_prior", blind_N, rows)
    return join({"plain": plain, "corrected": corrected, "blind": blind})


def _tokens(loaded: LoadedModel, texts: Sequence[str], length: int) -> np.ndarray:
    lower = loaded.config.get("captions", {}).get("lower", False)
    return loaded.tokenizer.encode_batch([clean_text(text, lower) for text in texts], length)
