"""capjax: pretraining image captioners at scale in JAX."""

__version__ = "0.1.0"


def load(path, step=None):
    """Loads a checkpoint as a ready captioner (see `capjax.decoding.load.load`)."""
    from capjax.decoding.load import load as load_captioner  # keeps `import capjax` free of jax

    return load_captioner(path, step)
