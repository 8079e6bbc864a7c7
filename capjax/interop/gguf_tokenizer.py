"""The byte-level tokenizer in a GGUF file's metadata, as the `tokenizer.json` of a captioner."""

from typing import Any

from capjax.data.tokenizer import EOS_ID
from capjax.errors import UserError
from capjax.interop.tensor_files import need_package

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types; 1 is an ordinary token
_EOS = "<eos>"  # by which `HuggingFaceTokenizer` knows the end
# What cuts a text into words before its bytes are paired: whether every digit is alone.
_DIGITS_ALONE = {"gpt-2": False, "smollm": True, "starcoder": True, "refact": True}


def tokenizer_json(told: dict[str, Any]) -> bytes:
    """`tokenizer.json` with the file's ids, where token 1 is called the end of a text.

    Texts become the ids that the language model was trained with; none that stands for a control
    token, unless it is spelt out. The same metadata give the same bytes, so a captioner was trained
    on this tokenizer where its own equals it.

    Raises `UserError` for another kind than GPT-2's, or words cut in a way that is not known.
    """
    tokenizers = need_package("tokenizers", "lm")
    kind, words = told["tokenizer.ggml.model"], told.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or words not in _DIGITS_ALONE:
        raise UserError(
            f"a tokenizer of kind {kind}, {words}: expected gpt2 with one of "
            f"{', '.join(_DIGITS_ALONE)}"
        )
    tokens, kinds = list(told["tokenizer.ggml.tokens"]), told["tokenizer.ggml.token_type"]
    tokens[EOS_ID] = _EOS
    merges = [tuple(pair.split(" ")) for pair in told["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    cut = tokenizers.pre_tokenizers
    of_bytes = cut.ByteLevel(add_prefix_space=told.get("tokenizer.ggml.add_space_prefix", False))
    digits = [cut.Digits(individual_digits=True)] if _DIGITS_ALONE[words] else []
    made.pre_tokenizer = cut.Sequence([*digits, of_bytes])
    made.decoder = tokenizers.decoders.ByteLevel()
    for number, token_kind in enumerate(kinds):
        if token_kind in (CONTROL, USER_DEFINED):
            is_control = token_kind == CONTROL
            token = tokenizers.AddedToken(tokens[number], special=is_control, normalized=False)
            (made.add_special_tokens if is_control else made.add_tokens)([token])
    return made.to_str().encode()
