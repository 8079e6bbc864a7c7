"""A captioner as a language model: what it writes where it is shown no image."""

import dataclasses

from capjax.dims import Params
from capjax.models.cache import LayerCache
from capjax.models.captioner import Captioner
from capjax.models.coca import CoCa
from capjax.models.text_decoder import DecodeStep


@dataclasses.dataclass(frozen=True)
class WithoutImage:
    """Guides another captioner of the same tokenizer, as a `generate.LanguageModel`.

    Of use where the model was trained with `image_dropout`; it may be of another checkpoint, such
    as one trained on captions of the style that is wanted.
    """

    model: Captioner | CoCa

    @property
    def vocab_size(self) -> int:
        """Tokens that can be predicted."""
        return self.model.config.vocab_size

    def start_decoding(
        self, params: Params, *, batch: int, length: int, num_rows: int
    ) -> tuple[DecodeStep, tuple[LayerCache, ...]]:
        """As `Captioner.start_decoding`, of rows that see no image."""
        return self.model.start_decoding(
            params, [None], batch=batch, length=length, num_rows=num_rows
        )
