"""Checkpoints: all that a run needs to continue bit for bit, and all that its model needs alone.

    checkpoints/00000700/
      state/           Orbax: a nested dict {"step", "params", "opt_state", "key_data"}
      tokenizer.model  SentencePiece; absent where the run had no tokenizer
      capjax.json      metadata: config, versions, digests, hashes; its own hash; written last

A save is written to `00000700.partial` and renamed when it is complete.

Nothing damaged passes unnoticed: `capjax.json` carries a hash of itself, the sizes of all files,
the hashes of those that hold no bulk data, and a digest of every array, taken of the live arrays
when they are saved and compared with that of the arrays that were read.
"""

from capjax.checkpoint.checkpointer import Checkpointer, check_disk_space
from capjax.checkpoint.directory import find_steps, list_steps, step_directory
from capjax.checkpoint.keeping import Keep, best_step
from capjax.checkpoint.metadata import RunInfo
from capjax.checkpoint.reading import LoadedCheckpoint, load_params, load_types, verify

__all__ = [
    "Checkpointer",
    "Keep",
    "LoadedCheckpoint",
    "RunInfo",
    "best_step",
    "check_disk_space",
    "find_steps",
    "list_steps",
    "load_params",
    "load_types",
    "step_directory",
    "verify",
]
