"""What turns a picture into the input that a set of weights was trained on. A record; imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from zoo.errors import WeightsError, nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize so that the crop is ``crop_pct`` of the shorter side, crop the centre, scale to 0..1, normalise.

    With ``crop_mode="squash"`` the crop is ``crop_pct`` of both sides: the picture loses its aspect ratio, no border.
    """

    img_size: tuple[int, int] = (224, 224)  # (height, width) of the crop in pixels
    crop_pct: float = 0.875
    crop_mode: str = "center"  # or "squash"
    interpolation: str = "bicubic"  # "bicubic", "bilinear" or "nearest"
    mean: tuple[float, ...] = IMAGENET_MEAN  # per channel, of pixels in 0..1
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        size = self.img_size
        object.__setattr__(self, "img_size", (size, size) if isinstance(size, int) else tuple(size))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if len(self.img_size) != 2 or min(self.img_size) < 1:
            raise WeightsError(f"preprocessing.img_size is {size}; expected a side or (height, width) in pixels.")
        if not 0.0 < self.crop_pct <= 1.0:
            raise WeightsError(f"preprocessing.crop_pct is {self.crop_pct}; expected 0 < crop_pct <= 1.")
        if self.crop_mode not in ("center", "squash"):
            raise WeightsError(f"preprocessing.crop_mode is {self.crop_mode!r}; expected 'center' or 'squash'.")
        if self.interpolation not in ("bicubic", "bilinear", "nearest"):
            raise WeightsError(
                f"preprocessing.interpolation is {self.interpolation!r}; expected 'bicubic', 'bilinear' or 'nearest'."
            )
        if len(self.mean) != len(self.std) or min(self.std, default=1.0) <= 0.0:
            raise WeightsError("preprocessing.mean and .std must have one entry per channel, std above 0.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; lists are taken for tuples, an unknown key is an error."""
        names = [spec.name for spec in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise WeightsError(f"preprocessing has no key {name!r}.{nearest(name, names)}")
        return cls(**values)
