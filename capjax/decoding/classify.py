"""Classes scored by the probability of their names: zero-shot classification with a captioner.

Images are encoded, and projected in every layer, once; the names are a tree of tokens, of which
every node is read once an image. Exact: a name's score is what a pass of its own would give. Source
of the protocol: Tschannen et al. 2023, "Image Captioners Are Scalable Vision Learners Too".
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from capjax.data.tokenizer import EOS_ID, PAD_ID
from capjax.decoding.score import encoded
from capjax.decoding.token_tree import TokenTree
from capjax.dims import Array, Float, Params
from capjax.errors import UserError
from capjax.mesh import BATCH, act_BL, out_sharding, replicated, reshard
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.many_texts import start_reading, tree
from capjax.models.parameters import broadcast
from capjax.objectives.captioning import token_nll


@functools.partial(jax.jit, static_argnums=0)
def score_tree(
    model: Captioner | CoCa, params: Params, inputs: Array | None, texts: TokenTree
) -> Float[Array, "B T L"]:
    """log p(token | tokens before it, image) of every text under every image; 0 at padding.

    `inputs` are those of `score_tokens`; None is no image, the prior, B = 1. Float32. Raises
    `UserError` for texts beyond the model's text length.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_rows = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)
    # Without image every device reads the same row.
    memory_BPD = encoded(model, params, inputs, num_rows, texts.labels_TL.shape[1])
    read = start_reading(model, params, memory_BPD)
    kernel_EV, bias_V = model.output_head(params)
    whole_EV, whole_V = reshard(kernel_EV, replicated), reshard(bias_V, replicated)

    def logits(hidden_BCE, token_C):
        kernel_EC = whole_EV[:, token_C].astype(hidden_BCE.dtype)
        logits_BC = jnp.einsum(
            "BCE,EC->BC", hidden_BCE, kernel_EC, preferred_element_type=jnp.float32
        )
        return logits_BC + whole_V[token_C][None]

    def read_chunk(chunk):
        token_C, position_C, parent_C, is_seen_CC, is_node_C = chunk
        look_back = tree(is_seen_CC, model.config.attention)
        hidden_BCE = read(token_C[None], position_C, look_back)
        # The normaliser of each node comes with the probability of the end there.
        ends_1C = jnp.where(is_node_C, EOS_ID, PAD_ID)[None]
        ends_BC = broadcast(ends_1C, hidden_BCE.shape[:2], act_BL)
        end_logprob_BC = -token_nll(
            hidden_BCE, kernel_EV, bias_V, ends_BC, vocab_size=model.config.vocab_size
        )
        end_C = jnp.full_like(token_C, EOS_ID)
        logsumexp_BC = logits(hidden_BCE, end_C) - end_logprob_BC
        logprob_BC = logits(hidden_BCE[:, parent_C], token_C) - logsumexp_BC[:, parent_C]
        return logprob_BC, end_logprob_BC

    found_2XBC = jnp.stack(lax.map(read_chunk, tuple(texts[:5])))
    num_images = found_2XBC.shape[2]
    found_BM = found_2XBC.transpose(2, 0, 1, 3).reshape(
        num_images, -1, out_sharding=out_sharding(act_BL)
    )
    logprobs_BTL = jnp.where(texts.labels_TL[None] == PAD_ID, 0.0, found_BM[:, texts.place_TL])
    return logprobs_BTL if inputs is not None else reshard(logprobs_BTL, replicated)[:1]


def class_texts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The templates of each class with its name in the place of "{}", a class after another.

    Raises `UserError` for a template without "{}", and where there is no class or template.
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"templates: {template!r} has no {{}} for the name of the class")
    if not class_names or not templates:
        raise UserError(f"{len(class_names)} classes, {len(templates)} templates: give some")
    return [template.replace("{}", name) for name in class_names for template in templates]


def class_scores(
    scores_BT: np.ndarray,
    num_prompts: int,
    priors_T: np.ndarray | float = 0.0,
    alpha: float = 0.0,
    combine: str = "logsumexp",
) -> np.ndarray:
    """[B, classes]: scores of texts, minus alpha * their priors, joined over a class's prompts.

    Args:
      scores_BT: `total` or `mean` of the texts, the `num_prompts` of the first class first.
      priors_T: the same of the texts without image.
      combine: "logsumexp" adds the prompts' probabilities up, "mean" takes the mean of the scores.

    Raises `UserError` for another `combine`, and where the texts do not divide.
    """
    if combine not in ("logsumexp", "mean"):
        raise UserError(f"combine={combine!r}: choose one of 'logsumexp', 'mean'")
    num_images, num_texts = scores_BT.shape
    if num_prompts < 1 or num_texts % num_prompts:
        raise UserError(f"num_prompts={num_prompts}: expected a divisor of the {num_texts} texts")
    scores_BTR = (scores_BT - alpha * np.broadcast_to(priors_T, num_texts)).reshape(
        num_images, -1, num_prompts
    )
    return scores_BTR.mean(-1) if combine == "mean" else np.logaddexp.reduce(scores_BTR, axis=-1)
