"""An image encoder alone, with the pooling head that it was trained with."""

import dataclasses
from typing import ClassVar

from flax import nnx

from capjax.dims import Array, Float, Params, UInt8
from capjax.models.functional import PureModel
from capjax.models.image_encoder import ImageEncoder, ImageEncoderConfig, normalize
from capjax.models.pooling import MapHead, pool


class PoolingHead(nnx.Module):
    """The head of `pool="map"`, where `TwoTowers` keeps it too."""

    def __init__(self, config: ImageEncoderConfig):
        self.pool = MapHead(config)


class ImageTowerModule(nnx.Module):
    """Encoder and head; used through `ImageTower`."""

    def __init__(self, config: ImageEncoderConfig):
        self.encoder = ImageEncoder(config)
        self.image_head = PoolingHead(config) if config.pool == "map" else None


@dataclasses.dataclass(frozen=True)
class ImageTower(PureModel):
    """An image encoder of one configuration; other models start from its parameters by name."""

    config: ImageEncoderConfig
    module_class: ClassVar[type] = ImageTowerModule

    def encode(
        self, params: Params, images_BHWC: UInt8[Array, "B H W C"] | Float[Array, "B H W C"]
    ) -> Float[Array, "B P D"]:
        """The image encoder's whole sequence. Images are uint8, or floats already normalised."""
        return self.module(params).encoder(normalize(images_BHWC, self.config))

    def pooled(self, params: Params, memory_BPD: Float[Array, "B P D"]) -> Float[Array, "B D"]:
        """The image's feature."""
        if self.config.pool != "map":
            return pool(memory_BPD, self.config)
        return self.module(params).image_head.pool(memory_BPD)
