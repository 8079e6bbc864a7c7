"""The evaluation of a run's splits, in training and by `capjax evaluate`."""

import functools

import jax
from etils import epath
from jax.sharding import Mesh

from capjax.commands.build import DataPlan, Plan, evaluation_batches
from capjax.data.captions import reference_texts
from capjax.data.sources import Source
from capjax.data.tokenizer import Tokenizer
from capjax.dims import Params
from capjax.evaluation.likelihood import evaluate_likelihood
from capjax.evaluation.retrieval import evaluate_retrieval
from capjax.evaluation.splits import caption_split, write_captions
from capjax.models.towers import Towers
from capjax.objectives.combined import Objectives
from capjax.training.loop import Evaluator


def build_evaluators(plan: Plan, captions: epath.Path) -> list[Evaluator]:
    """One evaluator for each split; at the end of the run it takes every example."""
    settings = plan.config.evaluate

    def run(name, split, state, step):
        return evaluate_split(
            plan.towers,
            state.params if state.ema is None else state.ema,
            mesh=plan.mesh,
            data=plan.data,
            tokenizer=plan.tokenizer,
            split=split,
            batch_size=settings.batch_size,
            max_examples=None if step == plan.total_steps else settings.max_examples,
            step=step,
            captions_file=captions / f"{name}.jsonl",
            objectives=plan.objectives,
        )

    return [
        Evaluator(name, settings.every_steps, functools.partial(run, name, split))
        for name, split in plan.splits.items()
    ]


def evaluate_split(
    towers: Towers,
    params: Params,
    *,
    mesh: Mesh,
    data: DataPlan,
    tokenizer: Tokenizer,
    split: tuple[str, Source],
    batch_size: int,
    max_examples: int | None,
    step: int,
    captions_file: epath.Path,
    objectives: Objectives,
) -> dict[str, float]:
    """What can be measured of one split: likelihood and captions, retrieval, or all of it.

    Its captions are written to a file.
    """
    name, source = split
    batches = functools.partial(
        evaluation_batches,
        data,
        source,
        tokenizer,
        batch_size=batch_size,
        max_examples=max_examples,
    )
    metrics: dict[str, float] = {}
    if towers.generator is not None:
        with batches() as rows:
            metrics |= evaluate_likelihood(towers.generator, params, rows, mesh)
        with batches() as rows:
            agreement, records = caption_split(
                towers.generator,
                params,
                rows,
                mesh=mesh,
                tokenizer=tokenizer,
                source=source,
                source_name=name,
                references=lambda example: reference_texts(example, data.captions),
                step=step,
            )
        if jax.process_index() == 0:
            captions_file.parent.mkdir(parents=True, exist_ok=True)
            write_captions(captions_file, records)
        metrics |= agreement
    if towers.embedder is not None:
        is_coca = towers.coca is not None
        objective = objectives.coca if is_coca else objectives.contrastive
        with batches() as rows:
            metrics |= evaluate_retrieval(
                towers.embedder,
                params,
                rows,
                mesh,
                kind="softmax" if is_coca else objectives.contrastive.kind,
                max_logit_scale=objective.max_logit_scale,
            )
    return metrics
