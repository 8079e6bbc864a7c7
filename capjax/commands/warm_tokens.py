"""The tokenizer of a run that starts from the parameters of another."""

from capjax.checkpoint import load_types
from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError
from capjax.training.patterns import by_name, compiled
from capjax.training.warm_start import WarmStart

# Parameters with a row or a column for each token.
BY_TOKEN = ("token_embedding/embedding", "head/kernel", "head/bias")


def warm_tokenizer(warm: WarmStart) -> Tokenizer | None:
    """That of the checkpoint a run starts from, where it takes parameters that go by token.

    None where it starts from none, or takes no such parameters. Raises `UserError` where the
    checkpoint, as one that was converted may, has no tokenizer.
    """
    if not warm.path:
        return None
    theirs = load_types(warm.path)
    include = [compiled(pattern, "warm_start.include") for pattern in warm.include or (".*",)]
    exclude = [compiled(pattern, "warm_start.exclude") for pattern in warm.exclude]
    taken = [
        name
        for name in by_name(theirs.params)
        if name.endswith(BY_TOKEN)
        and any(pattern.fullmatch(name) for pattern in include)
        and not any(pattern.fullmatch(name) for pattern in exclude)
    ]
    if not taken:
        return None
    if not theirs.tokenizer_model:
        raise UserError(
            f"the warm start takes {', '.join(taken)}, but {warm.path} has no tokenizer; set "
            "data.tokenizer.path to the one that they were trained with"
        )
    return Tokenizer.from_bytes(theirs.tokenizer_model)
