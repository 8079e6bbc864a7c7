"""Sizes of transformers by name: "B/16" is the ViT-B with patches of 16 pixels.

Source: `decode_variant` in big_vision's `models/vit.py`.
"""

from typing import Any

from capjax.errors import UserError, did_you_mean

# width, depth, num_heads, mlp_dim
_SIZES = {
    "mu": (32, 1, 2, 128),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "g-opt": (1536, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
    "G-opt": (1536, 48, 16, 8192),
    "e": (1792, 56, 16, 15360),
}


def variant(name: str) -> dict[str, Any]:
    """Fields of a configuration: width, depth, num_heads, mlp_dim, and patch_size after a slash.

    Raises `UserError` for a name that is none.
    """
    size, slash, patch = name.partition("/")
    if size not in _SIZES:
        raise UserError(
            f"variant={name!r}: no size is called {size!r}{did_you_mean(size, _SIZES)}; "
            f"choose one of {', '.join(_SIZES)}"
        )
    fields = dict(zip(("width", "depth", "num_heads", "mlp_dim"), _SIZES[size], strict=True))
    if not slash:
        return fields
    if not (patch.isascii() and patch.isdigit() and int(patch)):
        raise UserError(f"variant={name!r}: expected a patch size in pixels, such as {size}/16")
    return fields | {"patch_size": int(patch)}
