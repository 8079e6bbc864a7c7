"""The evaluation of a run's splits, in training and by `capjax evaluate`."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from capjax.commands.build import DataPlan, Plan, evaluation_batches
from capjax.commands.compose import compose, judge_frames
from capjax.commands.judged import judge_captions
from capjax.commands.measures import Measures, Probes
from capjax.commands.represent import represent
from capjax.commands.settings import resolved_dict
from capjax.data.captions import reference_texts
from capjax.data.pipeline import Batches
from capjax.data.sources import Source
from capjax.decoding.loaded_model import LoadedModel
from capjax.decoding.options import GREEDY, DecodingOptions
from capjax.decoding.prefix import prefix_ids
from capjax.errors import UserError
from capjax.evaluation.blindness import blindness
from capjax.evaluation.captions import distinct_ratio
from capjax.evaluation.likelihood import evaluate_likelihood
from capjax.evaluation.measured import Measured, join, write_measured
from capjax.evaluation.over_time import keep_over_time
from capjax.evaluation.retrieval import evaluate_retrieval
from capjax.evaluation.splits import CaptionRecord, caption_split, measure_records, write_captions
from capjax.objectives.combined import Objectives
from capjax.training.loop import Evaluator
from capjax.training.lora import merge

Opened = tuple[str, Source]  # what was opened, and the source


class Evaluation:
    """What the splits of a run have in common.

    `root` is the workdir: captions go to captions/<split>.jsonl, all that was measured to
    evaluations/<split>.json, probes to <split>@probes.json, captions with guidance to
    <split>@<scale>.json, a test of composition to test_<name>.json. `say` is told of a captioner
    that ignores its images, and of what cannot be measured, read or written; `unwritten` keeps the
    last. `features`: where the probes' are kept. `over_time`: of a run in training, so that what
    it says of a few images is added to captions/over_time/<split>.jsonl. Every process measures,
    the first one writes.
    """

    def __init__(
        self,
        root: epath.Path,
        mesh: Mesh,
        data: DataPlan,
        objectives: Objectives,
        measures: Measures,
        *,
        batch_size: int,
        max_examples: int | None,
        say: Callable[[str], None],
        features: epath.Path | None = None,
        over_time: bool = False,
    ) -> None:
        self.root = root
        self.mesh = mesh
        self.data = data
        self.objectives = objectives
        self.measures = measures
        self.batch_size = batch_size
        self.max_examples = max_examples
        self.say = say
        self.features = features
        self.over_time = over_time
        self.unwritten: list[str] = []
        self._unreadable = 0

    def split(self, name: str, opened: Opened, model: LoadedModel) -> dict[str, float]:
        """All that can be measured of one split; the numbers. `model` lies on the mesh.

        What cannot be is said and noted, and holds up nothing else.
        """
        self._unreadable = 0
        parts: dict[str, Measured] = {}
        if model.towers.generator is not None:
            likelihood = self._try(name, "loss", lambda: self._likelihood(opened, model))
            parts = {"likelihood": likelihood} | self._captions(name, opened, model, GREEDY)
            self._warn(name, join(parts))
        if model.towers.embedder is not None:
            parts["retrieval"] = self._try(
                name, "image_to_text_r1", lambda: self._retrieval(opened, model)
            )
        if self._unreadable:
            parts["read"] = Measured({}, notes={"unreadable": self._unreadable})
            self._say(f"{name}: {self._unreadable} images cannot be read and are left out")
        found = join(parts)
        self._write(name, found, model.step)
        if model.towers.generator is not None:
            for scale in self.measures.guidance_scales:
                options = DecodingOptions(guidance_scale=scale)
                guided = self._captions(f"{name}@{scale:g}", opened, model, options)
                self._write(f"{name}@{scale:g}", join(guided), model.step)
        probes = self.measures.probes
        if probes is None:
            return found.metrics
        more = self._try(name, "probes", lambda: self._probes(opened, model, probes))
        self._write(f"{name}@probes", more, model.step)
        return found.metrics | more.metrics

    def test(self, name: str, model: LoadedModel) -> dict[str, float]:
        """A test of composition, at most `max_examples` of it, evenly spread; the numbers."""
        items = dict(self.measures.tests)[name]
        count = min(len(items), self.max_examples or len(items))
        items = [items[place * len(items) // count] for place in range(count)]
        found = self._try(
            f"test_{name}", name, lambda: compose(model, name, items, batch_size=self.batch_size)
        )
        judge = self.measures.judge
        if name == "imagecode" and judge is not None and model.towers.generator is not None:
            judged = self._try(
                f"test_{name}",
                "imagecode_r1",
                lambda: judge_frames(judge, model, items, batch_size=self.batch_size),
            )
            found = join({"described": found, "captioned": judged})
        self._write(f"test_{name}", found, model.step)
        return found.metrics

    def _try(self, name: str, what: str, measure: Callable[[], Measured]) -> Measured:
        """A fault in the data of one evaluation must not end a run, nor the other evaluations."""
        try:
            return measure()
        except UserError as error:
            self._say(f"{name}: {what} not measured: {error}")
            return Measured({}, skipped={what: str(error)})

    @contextlib.contextmanager
    def _rows(self, opened: Opened, model: LoadedModel) -> Iterator[Batches]:
        """This process's batches; once they are read, `_unreadable` counts those of all."""
        with evaluation_batches(
            self.data,
            opened[1],
            model.tokenizer,
            batch_size=self.batch_size,
            max_examples=self.max_examples,
        ) as rows:
            yield rows
            counts = multihost_utils.process_allgather(np.array(rows.bad.total()))
            self._unreadable = int(counts.sum())

    def _likelihood(self, opened: Opened, model: LoadedModel) -> Measured:
        with self._rows(opened, model) as rows:
            return Measured(evaluate_likelihood(model.model, model.params, rows, self.mesh))

    def _captions(
        self, name: str, opened: Opened, model: LoadedModel, options: DecodingOptions
    ) -> dict[str, Measured]:
        with self._rows(opened, model) as rows:
            records = caption_split(
                model.model,
                model.params,
                rows,
                mesh=self.mesh,
                tokenizer=model.tokenizer,
                source=opened[1],
                source_name=opened[0],
                references=lambda example: reference_texts(example, self.data.references),
                step=model.step,
                options=options,
                prefix=prefix_ids(model),
            )
        # Pages show what lies in captions/ itself: a gallery for each split.
        folder = "captions/guided" if options.is_guided else "captions"
        self._keep(f"{folder}/{name}.jsonl", lambda path: write_captions(path, records))
        if self.over_time and not options.is_guided:
            self._keep(
                f"captions/over_time/{name}.jsonl",
                lambda path: keep_over_time(path, records, model.step),
            )
        measures = self.measures
        found = {
            "counted": Measured({"num_images": float(len(records))}),
            "captions": measure_records(
                records,
                tokenizer=measures.tokenizer,
                java=measures.java,
                lexicon=measures.lexicon,
            ),
        }
        if measures.judge is not None and records:
            found["judged"] = self._try(
                name, "clip_score", lambda: self._judged(measures.judge, opened[1], records)
            )
        known = [record.references[0] for record in records if record.references]
        notes: dict[str, Any] = {
            "guidance_scale": options.guidance_scale,
            "references_distinct_ratio": distinct_ratio(known) if known else None,
        }
        if options.is_guided and not model.has_null_image:
            notes["null_image"] = "trained without image_dropout: guidance leads away from nothing"
            self._say(f"{name}: {notes['null_image']}")
        return found | {"notes": Measured({}, notes=notes)}

    def _judged(self, judge: LoadedModel, source: Source, records: list[CaptionRecord]) -> Measured:
        images = [source[record.index].image for record in records]
        with jax.set_mesh(judge.mesh):  # not the run's
            found = judge_captions(judge, records, images, prompt=self.measures.judge_prompt)
        # Its retrieval of references by names of their own: a model may have towers too.
        own = ("image_to_text", "text_to_image", "retrieval")

        def renamed(values: dict) -> dict:
            return {f"judge_{k}" if k.startswith(own) else k: value for k, value in values.items()}

        return found._replace(
            metrics=renamed(found.metrics),
            intervals=renamed(found.intervals),
            skipped=renamed(found.skipped),
            notes=renamed(found.notes),
        )

    def _retrieval(self, opened: Opened, model: LoadedModel) -> Measured:
        is_coca = model.towers.coca is not None
        objective = self.objectives.coca if is_coca else self.objectives.contrastive

        def references(index: int) -> np.ndarray:
            texts = reference_texts(opened[1][index], self.data.references)
            return model.tokenizer.encode_batch(texts, self.data.text_length)

        with self._rows(opened, model) as rows:
            return evaluate_retrieval(
                model.embedder,
                model.params,
                rows,
                self.mesh,
                references=references,
                kind="softmax" if is_coca else self.objectives.contrastive.kind,
                max_logit_scale=objective.max_logit_scale,
            )

    def _probes(self, opened: Opened, model: LoadedModel, probes: Probes) -> Measured:
        return represent(
            model,
            probes.train,
            opened,
            probes.class_names,
            directory=self.features,
            batch_size=self.batch_size,
            max_examples=self.max_examples,
            max_train_examples=probes.max_examples,
        )

    def _warn(self, name: str, found: Measured) -> None:
        references = found.notes["references_distinct_ratio"] or 1.0
        if reason := blindness(found.metrics, references):
            self._say(f"on {name} the captioner {reason}")

    def _say(self, warning: str) -> None:
        if jax.process_index() == 0:
            self.say(f"warning: {warning}")

    def _write(self, name: str, measured: Measured, step: int) -> None:
        noted = measured._replace(notes={**measured.notes, "step": step})
        self._keep(f"evaluations/{name}.json", lambda path: write_measured(path, noted))

    def _keep(self, name: str, write: Callable[[epath.Path], None]) -> None:
        """Writes a file of the workdir; a disk that is full must not end a run."""
        if jax.process_index() != 0:
            return
        path = self.root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            self.unwritten.append(name)
            self._say(f"{path} not written: {error.strerror or error}")


def build_evaluators(plan: Plan, root: epath.Path, say: Callable[[str], None]) -> list[Evaluator]:
    """One evaluator for each split and test; at the end of the run they take every example."""
    settings = plan.config.evaluate
    config = resolved_dict(plan.config)

    def run(of: str, state, step):
        model = LoadedModel(
            towers=plan.towers,
            params=merge(state.params if state.ema is None else state.ema, plan.lora.scale),
            stored_tokenizer=plan.tokenizer,
            preprocessing=plan.data.preprocessing,
            config=config,
            step=step,
            mesh=plan.mesh,
        )
        evaluation = Evaluation(
            root,
            plan.mesh,
            plan.data,
            plan.objectives,
            plan.measures,
            batch_size=settings.batch_size,
            max_examples=None if step == plan.total_steps else settings.max_examples,
            say=say,
            over_time=True,
        )
        if of in plan.splits:
            return evaluation.split(of, plan.splits[of], model)
        return evaluation.test(of.removeprefix("test_"), model)

    return [
        Evaluator(name, settings.every_steps, functools.partial(run, name), plan.stage is not None)
        for name in (*plan.splits, *(f"test_{name}" for name, _ in plan.measures.tests))
    ]
