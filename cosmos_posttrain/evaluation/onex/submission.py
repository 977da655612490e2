"""The submission: what the model finds likely at every place of the predicted windows.

Flows in: the most likely tokens of each rollout. Flows out, in ``submission/``:

    tokens.npy       (N, T, H, W, 500) uint16 or int32, the most likely tokens, most likely first
    log_probs.npy    (N, T, H, W, 500) float16, their log-probabilities under the whole vocabulary
    submission.json  which window of the set each row continues, and how it was made

Written last, ``submission.json`` makes it complete. Rows of a killed run stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain import files
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.evaluation.onex.parts import MostLikely, Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER = "submission"
_INDEX = "submission.json"


class Submission:
    """The files of a submission, row by row; for the one process that writes them.

    Args:
        output: the evaluation's folder.
        part: the rollout.
        num_rows: rollouts.
        vocab_size: tokens that can be predicted.
        num_top: tokens of a place.
        is_begun: some rows are there already.

    Raises:
        OutputFolderError: the disk is too small.
        DatasetError: earlier rows are damaged.
    """

    def __init__(
        self,
        output: Path,
        part: Part,
        num_rows: int,
        vocab_size: int,
        num_top: int,
        is_begun: bool,
    ) -> None:
        self.folder = output / FOLDER
        shape = part.shape
        num_frames = part.num_predicted // shape.tokens_per_frame
        self._shape = (num_rows, num_frames, shape.height, shape.width, num_top)
        tokens = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
        if not is_begun:
            num_bytes = int(np.prod(self._shape)) * (tokens.itemsize + 2)
            files.check_free_space(output, num_bytes, "the submission")
        self.folder.mkdir(exist_ok=True)
        (self.folder / _INDEX).unlink(missing_ok=True)
        self._tokens = self._open("tokens.npy", tokens, is_begun)
        self._log_probs = self._open("log_probs.npy", np.dtype(np.float16), is_begun)

    def _open(self, name: str, dtype: np.dtype[Any], is_begun: bool) -> NDArray[Any]:
        path = self.folder / name
        if not is_begun:
            array: NDArray[Any] = np.lib.format.open_memmap(
                path, mode="w+", dtype=dtype, shape=self._shape
            )
            return array
        try:
            array = np.lib.format.open_memmap(path, mode="r+")
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{path} is damaged: {error}; start anew with --overwrite."
            ) from error
        if array.shape != self._shape or array.dtype != dtype:
            raise DatasetError(
                f"{path} is damaged: it has {array.shape} of {array.dtype}, expected {self._shape} "
                f"of {dtype}; start anew with --overwrite."
            )
        return array

    def write(self, row: int, most_likely: MostLikely, item: int) -> None:
        """One rollout: row ``item`` of ``most_likely`` becomes ``row`` of the files."""
        self._tokens[row] = most_likely.tokens[item].reshape(self._shape[1:])
        self._log_probs[row] = most_likely.log_probs[item].reshape(self._shape[1:])

    def flush(self) -> None:
        """Forces the rows to disk."""
        for array in (self._tokens, self._log_probs):
            assert isinstance(array, np.memmap)
            array.flush()

    def finish(self, windows: Sequence[int], settings: dict[str, Any]) -> None:
        """Writes the index.

        Args:
            windows: number of the given window in the set, for each row.
            settings: of the evaluation.
        """
        self.flush()
        value = {
            "tokens": "tokens.npy",
            "log_probs": "log_probs.npy",
            "shape": list(self._shape),
            "given_windows": list(windows),
            "decoding": "greedy rollout: each token is predicted from the given window and the "
            "model's own most likely tokens before it",
            "settings": settings,
        }
        files.write_json(self.folder / _INDEX, value)
