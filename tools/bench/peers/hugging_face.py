"""Hugging Face's captioners on torch at CapPa's dimensions, with random weights.

Variants: "ved" (default), a VisionEncoderDecoder of a ViT and a BERT decoder with cross-attention,
or "blip"; "compile": under torch.compile. For bfloat16 the step runs under autocast. Attention is
the library's choice: torch's scaled_dot_product_attention in the first, eager in BLIP. Dropout is
off; AdamW is the fused one. What differs from CapPa: a class token, biases in the decoder, one more
linear layer before the output, which is tied to the token embedding, and no parallel rows; BLIP
smooths its labels.
"""

import os
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from capjax.models.presets import variant
from peers import B2, LEARNING_RATE, NUM_PRODUCTS, WEIGHT_DECAY, Job, Step, gemm_size


def _sizes(job: Job, depth: int) -> dict[str, Any]:
    sizes = variant(job.size)
    return {
        "hidden_size": sizes["width"],
        "num_hidden_layers": depth,
        "num_attention_heads": sizes["num_heads"],
        "intermediate_size": sizes["mlp_dim"],
    }


def _image(job: Job) -> dict[str, Any]:
    sizes = variant(job.size)
    image = {"image_size": job.image_size, "patch_size": sizes["patch_size"]}
    return _sizes(job, sizes["depth"]) | image


def _text(job: Job) -> dict[str, Any]:
    return _sizes(job, job.decoder_depth) | {
        "vocab_size": job.vocab_size,
        "max_position_embeddings": job.text_length,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def vision_encoder_decoder(job: Job) -> torch.nn.Module:
    """A ViT without its pooler, and a BERT decoder."""
    image = transformers.ViTConfig(**_image(job))
    text = transformers.BertConfig(**_text(job), is_decoder=True, add_cross_attention=True)
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(image, add_pooling_layer=False),
        decoder=transformers.BertLMHeadModel(text),
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def blip(job: Job) -> torch.nn.Module:
    """BLIP's captioner."""
    image = _image(job) | {"attention_dropout": 0.0}
    text = _text(job) | {"encoder_hidden_size": image["hidden_size"]}
    text |= {"bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    config = transformers.BlipConfig(vision_config=image, text_config=text)
    return transformers.BlipForConditionalGeneration(config)


def gemm_of(dtype: torch.dtype, device: str):
    """(some square products of that type, which are waited for; their FLOPs)."""
    size = gemm_size(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def products() -> None:
        for _ in range(NUM_PRODUCTS):
            torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return products, NUM_PRODUCTS * 2.0 * size**3


def prepare(job: Job) -> Step:
    """See the module."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # on GPUs TF32, as JAX by default
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags = job.variant.split("+")
    model = (blip if "blip" in flags else vision_encoder_decoder)(job).train().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, B2),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    call = torch.compile(model) if "compile" in flags else model
    rng = np.random.default_rng(0)
    shape = (job.batch_size, 3, job.image_size, job.image_size)
    pixels = torch.tensor(rng.uniform(-1, 1, shape).astype(np.float32), device=device)
    tokens = rng.integers(3, job.vocab_size, (job.batch_size, job.text_length))
    batch = {"pixel_values": pixels, "labels": torch.tensor(tokens, device=device)}
    if "blip" in flags:
        batch["input_ids"] = batch["labels"]
    dtype = getattr(torch, job.dtype)

    def run() -> float:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = call(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "params_m": round(sum(x.numel() for x in model.parameters()) / 1e6, 2),
    }
    return Step(run, *gemm_of(dtype, device), facts)
