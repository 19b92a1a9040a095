"""One training batch: what the loader makes and an objective learns from.

Shapes use one alphabet: B batch, H W padded image (pixels), N predicted masks, M padded targets,
K classes, h w original image. Sizes are always (height, width) in pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # jax.Array on a device, np.ndarray on the host

# The mapped axis of a training step: the devices that share a batch; batch norm averages over it.
DEVICE_AXIS = "devices"


class Batch(NamedTuple):
    """One training batch, padded to a static shape.

    Attributes:
      images: uint8 [B, H, W, 3], RGB; content at the top left, 0 outside `valid_size`.
      valid_size: int32 [B, 2], (height, width) of the content in pixels.
      labels: int32 [B, M], 0..K-1; 0 where `is_target` is False.
      masks: uint8, in the form that the family asks for (`data.target_masks`): [B, M, H/4, W/4],
        levels 0..4: four times the mean of the inner 2x2 pixels of each 4x4 block of the full-size
        mask; or [B, M, H, W/8], the full-size mask in bits.
      is_target: bool [B, M], False for padding.
      image_id: int64 [B], the data set's ids; used on the host only.
      is_ignored: bool [B, H/s, W/s] at the form's stride s (4 or 1), pixels that count neither
        for nor against a mask (crowd regions); None when there are none by configuration.
    """

    images: Array
    valid_size: Array
    labels: Array
    masks: Array
    is_target: Array
    image_id: Array
    is_ignored: Array | None = None
