"""What rewards need from the host: arrays by image, texts, and the host's own rewards."""

import runpy
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import numpy as np
from etils import epath

from capjax.data.batches import Batches
from capjax.data.captions import CaptionChoice, reference_texts
from capjax.data.curriculum import source_keys
from capjax.data.mixture import Mixture
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source
from capjax.data.tokenizer import EOS_ID, PAD_ID, Tokenizer
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.evaluation.features import frozen_features
from capjax.rewards.consensus_device import NgramTable, ngram_table
from capjax.rewards.consensus_reward import ConsensusReward
from capjax.rl.reward_terms import (
    HOST,
    REFERENCES,
    TOWER_IMAGE,
    TOWER_NEGATIVES,
    TOWER_REFERENCES,
    TOWER_TOKENS,
    Rewards,
)

Rows = dict[str, np.ndarray]
MAX_REFERENCES = 5  # of an image, on the device
NO_CAPTION = "rewards.cider_d: no example of data.source has a caption of captions.sources"


def references_of(source: Source, choice: CaptionChoice) -> list[list[str]]:
    """The reference captions of every example; none where it cannot be read."""

    def texts(index: int) -> list[str]:
        try:
            dataset = source.name_at(index) if isinstance(source, Mixture) else ""
            return reference_texts(source[index], choice.of(dataset))
        except CorruptRecord:
            return []

    return [texts(index) for index in range(len(source))]


class ImageArrays:
    """The arrays of a batch that depend on its images alone, from their indices.

    The towers embed every image of the source once, as it is (not augmented); what they made is
    kept in `directory`, and here as `image_ND`: zeros where an image cannot be read. `tokenizer`
    and `text_length` are the captioner's; its captions stand behind `prefix`, references are cut
    into tokens there too. `ngrams`: document frequencies of the references' ids, for CIDEr-D on the
    device; None without it. Raises `UserError` as `frozen_features`.
    """

    def __init__(
        self,
        rewards: Rewards,
        towers: LoadedModel | None,
        opened: tuple[str, Source],
        references: Callable[[], list[list[str]]],
        *,
        directory: epath.Path,
        batch_size: int,
        prompt: str,
        tokenizer: Tokenizer,
        text_length: int,
        prefix: str = "",
    ) -> None:
        self.image_ND = self._nearest_NM = self._reference_NRT = self._label_NRL = None
        self.ngrams: NgramTable | None = None
        if "cider_d" in rewards.used and rewards.cider_d.on == "device":
            labels = [
                _labels(tokenizer, captions, text_length, prefix) for captions in references()
            ]
            known = [image[image[:, 0] != PAD_ID] for image in labels if image.any()]
            if not known:
                raise UserError(NO_CAPTION)
            self._label_NRL, self.ngrams = np.stack(labels), ngram_table(known)
        if towers is None:
            return
        self.image_ND = _embedded(towers, opened, directory, batch_size)
        count = rewards.self_retrieval.num_negatives if "self_retrieval" in rewards.used else 0
        if count:
            self._nearest_NM = _nearest(self.image_ND, count)
        if "ref_clip_score" in rewards.used:
            texts = [captions[:MAX_REFERENCES] for captions in references()]
            self._reference_NRT = np.stack(
                [tower_texts(towers, captions, prompt, MAX_REFERENCES) for captions in texts]
            )

    def __call__(self, rows: Rows) -> Rows:
        """`rows` with the arrays of their `index`."""
        index = rows["index"]
        if self.image_ND is not None:
            rows = rows | {TOWER_IMAGE: self.image_ND[index]}
        if self.image_ND is not None and self._nearest_NM is not None:
            rows = rows | {TOWER_NEGATIVES: self.image_ND[self._nearest_NM[index]]}
        if self._reference_NRT is not None:
            rows = rows | {TOWER_REFERENCES: self._reference_NRT[index]}
        if self._label_NRL is not None:
            rows = rows | {REFERENCES: self._label_NRL[index]}
        return rows

    def shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape of a row and type of each array."""
        one = self({"index": np.zeros(1, np.int32)})
        return {name: (x.shape[1:], x.dtype.type) for name, x in one.items() if name != "index"}


def _embedded(
    towers: LoadedModel, opened: tuple[str, Source], directory: epath.Path, batch_size: int
) -> np.ndarray:
    """float32 [N, D], by the index of the example; zeros for an image that cannot be read."""
    assert towers.mesh is not None
    found = frozen_features(
        towers.towers,
        towers.params,
        opened,
        towers.preprocessing,
        mesh=towers.mesh,
        kind="embedding",
        batch_size=batch_size,
        directory=directory,
    )
    if not found.unreadable:
        return found.values
    keys = source_keys(opened[1])
    row_of, counts = {key: row for row, key in enumerate(keys)}, Counter(keys)
    if any(counts[key] > 1 for key in found.keys):
        raise UserError(
            f"{opened[0]}: {found.unreadable} images cannot be read, and keys occur twice, so that "
            "which they are is not known; mend the source"
        )
    image_ND = np.zeros((len(opened[1]), found.values.shape[1]), np.float32)
    image_ND[[row_of[key] for key in found.keys]] = found.values
    return image_ND


def _nearest(image_ND: np.ndarray, count: int, block: int = 1024) -> np.ndarray:
    """int32 [N, count]: the rows with the largest cosines, themselves left out."""
    if count >= len(image_ND):
        raise UserError(
            f"rewards.self_retrieval.num_negatives={count} of {len(image_ND)} images: expected less"
        )
    parts = []
    for start in range(0, len(image_ND), block):
        cosine = image_ND[start : start + block] @ image_ND.T
        rows = np.arange(len(cosine))
        cosine[rows, start + rows] = -np.inf
        parts.append(np.argpartition(-cosine, count - 1, axis=1)[:, :count].astype(np.int32))
    return np.concatenate(parts)


def _labels(tokenizer: Tokenizer, texts: list[str], length: int, prefix: str) -> np.ndarray:
    """int32 [`MAX_REFERENCES`, L]: the first captions as written behind the prefix, then PAD."""
    made = np.full((MAX_REFERENCES, length), PAD_ID, np.int32)
    if texts := texts[:MAX_REFERENCES]:
        count = tokenizer.count(prefix) - 1 if prefix else 0
        behind = [f"{prefix} {text}" for text in texts] if prefix else texts
        made[: len(texts)] = tokenizer.encode_batch(behind, count + length)[:, count:]
    return made


def tower_texts(towers: LoadedModel, texts: list[str], prompt: str, rows: int = 0) -> np.ndarray:
    """int32 [texts, T] as the towers read them, or [rows, T] with rows of PAD behind them."""
    length = towers.embedder.config.text_length
    made = np.full((max(rows, len(texts)), length), PAD_ID, np.int32)
    if texts:
        made[: len(texts)] = towers.text_tokens([prompt + text for text in texts])
    return made


def load_function(name: str, file: str) -> Callable:
    """`reward` of a Python file. Raises `UserError` where there is none."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"rewards.functions.{name}.file={file}: there is no such file")
    try:
        found = runpy.run_path(str(path)).get("reward")
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"rewards.functions.{name}.file={file} raised {what}") from error
    if not callable(found):
        raise UserError(
            f"rewards.functions.{name}.file={file} defines no function "
            "reward(images, captions, references)"
        )
    return found


class HostScores:
    """What the host makes of sampled captions: its own rewards, and texts for other tokenizers.

    Args:
      references: of every example; none where no reward of the host is in use.
      functions: name -> `reward(images, captions, references)`: uint8 [b, H, W, 3] as the captioner
        sees them, lists of the captions of each, lists of the references of each -> [b, J].
      towers: those that read texts, not ids; None: no reward does.
    """

    def __init__(
        self,
        rewards: Rewards,
        tokenizer: Tokenizer,
        references: list[list[str]],
        functions: Mapping[str, Callable],
        towers: LoadedModel | None,
        prompt: str,
    ) -> None:
        self._tokenizer, self._references = tokenizer, references
        self._functions, self._towers, self._prompt = functions, towers, prompt
        self._consensus = None
        if "cider_d" in rewards.on_host:
            known = [captions for captions in references if captions]
            if not known:
                raise UserError(NO_CAPTION)
            self._consensus = ConsensusReward.train(known)

    def __call__(self, rows: Rows, tokens_bJL: np.ndarray) -> Rows:
        """The arrays that are `given` to the update, by name."""
        # Behind a prefix some tokenizers write the space before a caption.
        texts = [[self._tokenizer.decode(ids).lstrip() for ids in image] for image in tokens_bJL]
        known = [
            self._references[index] if is_used and self._references else []
            for index, is_used in zip(rows["index"], rows["mask"], strict=True)
        ]
        given: Rows = {}
        if self._consensus is not None:
            is_ended_bJ = (tokens_bJL == EOS_ID).any(2)
            given[f"{HOST}cider_d"] = self._consensus(texts, known, is_ended_bJ)
        for name, function in self._functions.items():
            given[HOST + name] = called(name, function, rows["image"], texts, known)
        if self._towers is not None:
            given[TOWER_TOKENS] = np.stack(
                [tower_texts(self._towers, captions, self._prompt) for captions in texts]
            )
        return given


def called(
    name: str,
    function: Callable,
    images: np.ndarray,
    texts: list[list[str]],
    references: list[list[str]],
) -> np.ndarray:
    """float32 [b, J]. Raises `UserError` for what it raises, or gives in another shape."""
    shape = len(texts), len(texts[0])
    try:
        value = np.asarray(function(images, texts, references), np.float32)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"rewards.functions.{name} raised {what}") from error
    if value.shape != shape or not np.isfinite(value).all():
        raise UserError(
            f"rewards.functions.{name} gave shape {value.shape}, expected finite numbers of shape "
            f"{shape}: one for each caption of each image"
        )
    return value


def with_arrays(batches: Batches, arrays: ImageArrays) -> Generator[Rows]:
    """Each batch with what depends on its images; closes the batches when it is closed."""
    with batches:
        for rows in batches:
            yield arrays(rows)
