"""The legend of shape letters, and the array aliases used everywhere.

A variable's suffix names its axes: `patches_BPD`, `tokens_BL`, `logits_BLV`.

    B  batch (global, unless a docstring says otherwise)
    H  image height     W  image width     C  image channels
    P  patches (the encoder's sequence)
    L  text length      S  keys attended to (text or patches)    T  texts of a batch
    D  encoder width    E  decoder width   F  hidden width of an MLP
    N  attention heads  K  width of one head
    V  vocabulary, padded to a multiple of 128 inside the model
    X  layers in a stack
"""

import jax
from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt, UInt8

Array = jax.Array
Params = dict  # nested dict of arrays by name; the leaves of one stack lead with an X axis
Batch = dict  # name -> array with leading axis B
Metrics = dict  # name -> scalar array

__all__ = [
    "Array",
    "Batch",
    "Bool",
    "Float",
    "Int",
    "Metrics",
    "PRNGKeyArray",
    "Params",
    "UInt",
    "UInt8",
]
