"""`capjax evaluate --captions`: captions against their references. No model, no device."""

import argparse

from capjax.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Prints the figures with their intervals, and writes them where `--output` says."""
    from capjax.evaluation.agreement import measure_captions
    from capjax.evaluation.caption_files import read_captions
    from capjax.evaluation.measured import write_measured

    captions = read_captions(args.captions, args.references)
    measured = measure_captions(
        captions.candidates, captions.references, captions.keys, tokenizer=args.tokenizer
    )
    if captions.left_out:
        measured.notes["left_out"] = captions.left_out
    if args.output:
        try:
            write_measured(args.output, measured)
        except OSError as error:
            raise UserError(f"--output={args.output}: {error.strerror}; choose another") from error
    print(text_of(measured))


def text_of(measured) -> str:
    """Metrics with their 95 % intervals as text, then what was not measured, then how the rest was.

    `measured` is a `Measured` of captions.
    """
    wide = max(map(len, measured.metrics))
    lines = [f"{measured.notes['num_items']:,} images"]
    for name, value in sorted(measured.metrics.items()):
        low_high = measured.intervals.get(name)
        interval = f"  [{low_high[0]:.4f}, {low_high[1]:.4f}]" if low_high else ""
        lines.append(f"{name:{wide}}  {value:10.4f}{interval}")
    lines += [f"{name:{wide}}  not measured: {why}" for name, why in measured.skipped.items()]
    notes = dict(measured.notes)
    notes.pop("num_items")
    if "treebank_agreement" in notes:
        share = notes.pop("treebank_agreement")
        notes["tokenizer"] += f" (treebank, without Java, agrees on {share:.2%} of the texts)"
    for reason, count in notes.pop("left_out", {}).items():
        lines.append(f"left out: {count:,} images with {reason}")
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in notes.items())])
