"""What the versions of the 1X World Model Challenge's data have in common, and what not. No torch.

v2.0    windows of 17 frames at 256x256 by Cosmos DV8x8x8: int32 (3, 32, 32) each; 25 numbers of the
        robot's state a frame
v1.1    every frame by itself by 1X's MAGVIT2: uint32 (16, 16), 18 bits each; several arrays of
        actions a frame. A window is 16 frames here, as in that challenge
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.geometry import ClipGeometry, Compression


@dataclass(frozen=True)
class OnexVersion:
    """One version's windows.

    Attributes:
        name: as 1X calls it.
        tokenizer: that made the tokens, by name; its weights' hash is not known from the data.
        clip: a window, in pixels and in tokens.
        frames_per_record: frames of one record of the video's file: a window's, or one.
        state_width: numbers a frame; None where the files tell.
    """

    name: str
    tokenizer: TokenizerInfo
    clip: ClipGeometry
    frames_per_record: int
    state_width: int | None

    @property
    def tokens_per_record(self) -> int:
        """Tokens of one record of the video's file."""
        return self.clip.seq_length * self.frames_per_record // self.clip.num_frames

    def num_windows(self, num_frames: int) -> int:
        """Windows of so many frames, a last one that is not full counted in."""
        return -(-num_frames // self.clip.num_frames)

    def num_records(self, num_frames: int) -> int:
        """Records of so many frames in the video's file."""
        return -(-num_frames // self.frames_per_record)


_DV8X8X8 = TokenizerInfo(
    "nvidia/Cosmos-0.1-Tokenizer-DV8x8x8", "", (8, 8, 8), (8, 8, 8, 5, 5, 5), 64000
)
_MAGVIT2 = TokenizerInfo("magvit2.ckpt", "", (1, 16, 16), (2,) * 18, 2**18)

V2_0 = OnexVersion("2.0", _DV8X8X8, ClipGeometry(17, 256, 256, Compression(8, 8, 8)), 17, 25)
V1_1 = OnexVersion("1.1", _MAGVIT2, ClipGeometry(16, 256, 256, Compression(1, 16, 16)), 1, None)
VERSIONS = {version.name: version for version in (V2_0, V1_1)}
