"""What is known of a clip of the small world: its objects, and where each is in every frame.

Flows in: the file ``truth/SPLIT/ID.json`` that ``python -m cosmos_posttrain.toy_world`` writes for
``videos/SPLIT/ID/rgb.mp4``. Flows out: a ``WorldTruth`` of numpy arrays. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain import files
from cosmos_posttrain.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_ARRAYS = {"positions": 3, "velocities": 3, "visible": 2, "camera": 2}
_DECIMALS = 4


@dataclass(frozen=True)
class WorldObject:
    """One object of a clip.

    Attributes:
        color: its name, as in the caption.
        rgb: in [0, 255]; the texture goes about it.
        shape: its name, as in the caption.
        diameter: in pixels, of a disc of the same area.
        direction: where it sets out for: ``left``, ``right``, ``up``, ``down``, two of them such as
            ``up and to the left``, or "" where it stays.
    """

    color: str
    rgb: tuple[int, int, int]
    shape: str
    diameter: float
    direction: str


@dataclass(frozen=True)
class WorldTruth:
    """The truth of one clip: T frames, K objects, the first in front.

    Attributes:
        objects: K of them.
        positions: (T, K, 2) float64 pixels (x, y) of the objects' centres; x to the right, y down,
            (0, 0) at the centre of the first pixel.
        velocities: (T, K, 2) float64, pixels a frame in the picture; where neither a wall nor a
            push nor the end of the still frames comes between, the next position is this one plus
            this.
        visible: (T, K) float64, share of the object that is in the picture and not hidden.
        camera: (T, 2) float64, where the picture's first pixel is in the world.
        height: of the picture.
        width: likewise.
        fps: frames a second.
        still_frames: so many first frames are the same.
        caption: what moves where.
    """

    objects: tuple[WorldObject, ...]
    positions: Array
    velocities: Array
    visible: Array
    camera: Array
    height: int
    width: int
    fps: float
    still_frames: int
    caption: str

    @property
    def colors(self) -> Array:
        """(K, 3) RGB."""
        return np.array([item.rgb for item in self.objects], np.float64)

    @property
    def diameters(self) -> list[float]:
        """K of them."""
        return [item.diameter for item in self.objects]

    def save(self, path: Path) -> None:
        """Writes the file atomically, numbers to a ten-thousandth of a pixel."""
        value = {key: getattr(self, key) for key in self.__dataclass_fields__}
        value["objects"] = [vars(item) for item in self.objects]
        for key in _ARRAYS:
            value[key] = (np.round(value[key], _DECIMALS) + 0.0).tolist()  # no -0.0
        files.write_text(path, files.json_text(value) + "\n")

    @classmethod
    def load(cls, path: Path) -> WorldTruth:
        """Reads the file.

        Raises:
            DatasetError: it is missing or damaged.
        """
        value = files.read_json(path, DatasetError, "render the small world again")
        try:
            return cls._from_plain(value)
        except (KeyError, TypeError, ValueError) as cause:
            raise DatasetError(
                f"{path} is damaged: {cause!r}; render the small world again."
            ) from cause

    @classmethod
    def _from_plain(cls, value: dict[str, Any]) -> WorldTruth:
        known = {key: value[key] for key in cls.__dataclass_fields__}
        fields = WorldObject.__dataclass_fields__
        known["objects"] = tuple(
            WorldObject(**{key: item[key] for key in fields} | {"rgb": tuple(item["rgb"])})
            for item in value["objects"]
        )
        for key, ndim in _ARRAYS.items():
            known[key] = np.array(value[key], np.float64)
            if known[key].ndim != ndim or len(known[key]) != len(known["positions"]):
                raise ValueError(f"{key} has the shape {known[key].shape}")
        return cls(**known)


def truth_path(video: Path) -> Path:
    """Where the truth of ``videos/SPLIT/ID/rgb.mp4`` lies; there is none beside other videos."""
    folder = video.parent
    return folder.parents[2] / "truth" / folder.parent.name / f"{folder.name}.json"
