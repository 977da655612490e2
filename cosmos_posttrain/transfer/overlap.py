"""Where tokens of two tokenizers overlap: in time by source frames, in space by the picture.

Flows in: clips' manifest rows and contracts. Flows out: how much latent frames overlap, and which
cells of two grids overlap by how much. No tokens are read here.

The first latent frame of a causal tokenizer stands for frame 0 alone, every other one for
``compression.time`` frames. Frames that only repeat a video's last one count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.manifest import DocumentRow
from cosmos_posttrain.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def frame_intervals(row: DocumentRow, contract: Contract) -> NDArray[np.float64]:
    """When each latent frame of a clip lies, in frames of the source video.

    A frame of the clip stands for the time around it, as long as the stride.

    Returns:
        (T, 2) start and end; the end lies before the start where only repeated frames are left.
    """
    step = contract.tokenizer.compression[0]
    latent = np.arange(contract.latent_shape[0])
    first = np.where(latent == 0, 0, 1 + (latent - 1) * step)
    last = np.minimum(latent * step, contract.clip.num_frames - 1 - row.num_repeated)
    ends = np.stack([first - 0.5, last + 0.5], axis=1)
    return row.first_frame + row.stride * ends


def time_overlaps(new: NDArray[np.float64], old: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many source frames latent frames share: (T, 2) and (T', 2) -> (T, T')."""
    low = np.maximum(new[:, None, 0], old[None, :, 0])
    high = np.minimum(new[:, None, 1], old[None, :, 1])
    return np.clip(high - low, 0.0, None)


def _cell_overlaps(new: int, old: int) -> tuple[NDArray[np.int64], ...]:
    """Cells of an axis cut into ``new`` and into ``old`` parts that overlap, and by how much."""
    i, j = np.arange(new)[:, None], np.arange(old)[None, :]
    # In units of 1 / (new * old) all borders are whole numbers.
    length = np.minimum((i + 1) * old, (j + 1) * new) - np.maximum(i * old, j * new)
    first, second = np.nonzero(length > 0)
    return first, second, length[first, second]


@dataclass(frozen=True)
class PicturePairs:
    """Cells of two grids over the same picture that overlap.

    Attributes:
        new_cells: (P,) int64, row by row in the new grid.
        old_cells: (P,) int64, row by row in the old one.
        areas: (P,) float64, shares of the picture; they add up to 1.
    """

    new_cells: NDArray[np.int64]
    old_cells: NDArray[np.int64]
    areas: NDArray[np.float64]

    @classmethod
    def of(cls, new: Contract, old: Contract) -> PicturePairs:
        """The pairs of two contracts.

        Raises:
            DatasetError: the clips have another aspect ratio, so their crops show other parts.
        """
        sizes = [(c.clip.width, c.clip.height) for c in (old, new)]
        if sizes[0][0] * sizes[1][1] != sizes[1][0] * sizes[0][1]:
            raise DatasetError(
                f"clips of {sizes[0][0]}x{sizes[0][1]} and of {sizes[1][0]}x{sizes[1][1]} are "
                "cropped to different parts of the picture; prepare both with the same ratio of "
                "width to height."
            )
        (_, new_rows, new_columns), (_, old_rows, old_columns) = new.latent_shape, old.latent_shape
        r_new, r_old, height = _cell_overlaps(new_rows, old_rows)
        c_new, c_old, width = _cell_overlaps(new_columns, old_columns)
        unit = new_rows * old_rows * new_columns * old_columns
        return cls(
            (r_new[:, None] * new_columns + c_new[None]).ravel(),
            (r_old[:, None] * old_columns + c_old[None]).ravel(),
            (height[:, None] * width[None] / unit).ravel(),
        )
