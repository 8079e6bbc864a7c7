"""The models of a run or of converted weights, over one set of parameters."""

import dataclasses
from typing import Any

import jax

from capjax.dims import Array, Float, Params, PRNGKeyArray, UInt8
from capjax.errors import UserError
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.coca import CoCa, CoCaConfig
from capjax.models.functional import PureModel
from capjax.models.image_encoder import ImageEncoderConfig, encoder_flops, normalize
from capjax.models.image_tower import ImageTower
from capjax.models.two_towers import TwoTowers, TwoTowersConfig

KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "captioner": (Captioner, CaptionerConfig),
    "two_towers": (TwoTowers, TwoTowersConfig),
    "coca": (CoCa, CoCaConfig),
    "image_encoder": (ImageTower, ImageEncoderConfig),
}


@dataclasses.dataclass(frozen=True)
class Towers:
    """One or more models; those that have an encoder in common read the same one.

    The captioner and the two towers share `params["encoder"]`. CoCa, which has decoder and towers
    of its own, and an image encoder without either stand alone. Raises `UserError` where the models
    do not go together.
    """

    captioner: Captioner | None = None
    two_towers: TwoTowers | None = None
    coca: CoCa | None = None
    image_encoder: ImageTower | None = None

    def __post_init__(self):
        if not self.models:
            raise UserError("no model: give an objective a weight above 0")
        if (self.coca or self.image_encoder) and len(self.models) > 1:
            raise UserError("CoCa and a mere image encoder go with no other model")
        first, *others = (self._encoder_fields(model) for model in self.models)
        for fields in others:
            wrong = {name for name in first if first[name] != fields[name]}
            if wrong:
                raise UserError(
                    f"models with one image encoder differ in {', '.join(sorted(wrong))}"
                )

    @staticmethod
    def _encoder_fields(model: PureModel) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(ImageEncoderConfig)]
        return {name: getattr(model.config, name) for name in names}

    @property
    def models(self) -> tuple[Any, ...]:
        """Those that there are, in the order of `KINDS`."""
        return tuple(model for kind in KINDS if (model := getattr(self, kind)) is not None)

    @property
    def generator(self) -> Captioner | CoCa | None:
        """The one that writes captions."""
        return self.captioner or self.coca

    @property
    def embedder(self) -> TwoTowers | CoCa | None:
        """The one that has images and texts in one space."""
        return self.two_towers or self.coca

    def encode(self, params: Params, images_BHWC: UInt8[Array, "B H W C"]) -> Float[Array, "B S D"]:
        """What the models see of the images, computed once for all of them."""
        return self.models[0].encode(params, images_BHWC)

    def encode_image(
        self, params: Params, images_BHWC: UInt8[Array, "B H W C"]
    ) -> Float[Array, "B P D"]:
        """The image encoder's features of the patches."""
        model = self.models[0]
        sequence_BSD = model.module(params).encoder(normalize(images_BHWC, model.config))
        return sequence_BSD[:, : model.config.num_patches]

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters; those of the first model are what it would draw alone."""
        params: Params = {}
        for number, model in enumerate(self.models):
            params = model.init(jax.random.fold_in(key, number) if number else key) | params
        return params

    def abstract_params(self) -> Params:
        """Shape and type of every parameter."""
        return {k: v for model in reversed(self.models) for k, v in model.abstract_params().items()}

    def param_specs(self) -> Params:
        """The `PartitionSpec` of every parameter."""
        return {k: v for model in reversed(self.models) for k, v in model.param_specs().items()}

    def unpadded_params(self) -> Params:
        """Shape and type of the part in use of every parameter."""
        return {k: v for model in reversed(self.models) for k, v in model.unpadded_params().items()}

    def num_params(self) -> int:
        """Parameters, what is shared counted once, without the padding of vocabularies."""
        return sum(x.size for x in jax.tree.leaves(self.unpadded_params()))

    def flops_per_example(self) -> float:
        """Matmul FLOPs of one training example, forward and backward; the encoder counted once."""
        flops = sum(model.flops_per_example() for model in self.models)
        return flops - (len(self.models) - 1) * 3.0 * encoder_flops(self.models[0].config)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Kind -> the fields of its configuration, for a checkpoint."""
        named = {kind: getattr(self, kind) for kind in KINDS}
        return {k: dataclasses.asdict(m.config) for k, m in named.items() if m is not None}


def towers_from_dict(kinds: dict[str, dict[str, Any]]) -> Towers:
    """The inverse of `Towers.to_dict`. Raises KeyError or TypeError for what is none."""
    made: dict[str, Any] = {}
    for kind, fields in kinds.items():
        model, config = KINDS[kind]
        made[kind] = model(config(**fields))
    return Towers(**made)
