"""Factors on the learning rate, parameter by parameter: by depth, and by name."""

from collections.abc import Iterable

import numpy as np

from capjax.dims import Params
from capjax.training.patterns import by_name, compiled, matching

Factor = float | np.ndarray

ENCODER = "encoder/"  # the image encoder, whose learning rate falls with depth
BLOCKS = "encoder/blocks/"


def rate_factors(
    params: Params, layer_decay: float, multipliers: Iterable[tuple[str, float]]
) -> dict[str, Factor]:
    """Name -> what its learning rate is multiplied by; of a stack an array over the layers.

    Block i = 0, …, n - 1 of the image encoder gets layer_decay**(n - i), what comes before the
    blocks (patches, positions, extra tokens) layer_decay**(n + 1), and all else, with the encoder's
    last norm, 1: the convention of BEiT and MAE (`run_class_finetuning.py`, `util/lr_decay.py`).
    On top of that comes the factor of the first of the `multipliers` whose pattern matches.
    """
    multipliers, shapes = list(multipliers), {n: x.shape for n, x in by_name(params).items()}
    matching([pattern for pattern, _ in multipliers], shapes, "optimizer.multipliers")
    expressions = [(compiled(p, "optimizer.multipliers"), factor) for p, factor in multipliers]
    depth = next((shape[0] for name, shape in shapes.items() if name.startswith(BLOCKS)), 0)

    def factor(name: str, shape: tuple[int, ...]) -> Factor:
        by_pattern = next((f for expression, f in expressions if expression.fullmatch(name)), 1.0)
        if layer_decay == 1 or not name.startswith(ENCODER) or name.startswith("encoder/norm/"):
            return by_pattern
        if not name.startswith(BLOCKS):
            return by_pattern * layer_decay ** (depth + 1)
        by_layer = by_pattern * layer_decay ** np.arange(depth, 0, -1, dtype=np.float32)
        return by_layer.reshape(depth, *(1,) * (len(shape) - 1))

    return {name: factor(name, shape) for name, shape in shapes.items()}
