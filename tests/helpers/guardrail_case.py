"""A guardrail folder, and a module that stands in for the package ``cosmos-guardrail``."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import torch

NAME = "cosmos_guardrail.cosmos_guardrail"


def write_folder(folder: Path) -> Path:
    """Word lists of one word each, and weights of the detector that hold nothing."""
    for name in ("custom", "exact_match", "whitelist"):
        (folder / "blocklist" / name).mkdir(parents=True)
        (folder / "blocklist" / name / "words.txt").write_text(f"{name}word\n")
    (folder / "face_blur_filter").mkdir()
    (folder / "face_blur_filter" / "Resnet50_Final.pth").write_bytes(b"weights")
    return folder


def stand_in() -> dict[str, types.ModuleType]:
    """The package's names: words of the lists are blocked, bright pixels are faces."""
    module = types.ModuleType(NAME)

    class Blocklist:
        def __init__(self) -> None:
            root = Path(module.snapshot_download("a/b", allow_patterns=["blocklist/*"]))
            self.words = (root / "blocklist/custom/words.txt").read_text().split()

        def is_safe(self, text: str) -> tuple[bool, str]:
            return not any(word in text for word in self.words), "words"

    class Qwen3Guard(torch.nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.is_broken = "broken" in (Path(path) / "config.json").read_text()

        def is_safe(self, text: str) -> tuple[bool, str]:
            if self.is_broken:
                return True, "Unexpected error occurred when running Qwen3Guard guardrail."
            return "rude" not in text, ""

    class RetinaFaceFilter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            root = Path(module.snapshot_download("a/b"))
            if (root / "face_blur_filter/Resnet50_Final.pth").read_bytes() != b"weights":
                raise RuntimeError("invalid load key.\nand more")

        def postprocess(self, frames: np.ndarray) -> np.ndarray:
            assert frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == np.uint8
            frames[frames > 200] = 0
            return frames

    def snapshot_download(*_args: object, **_options: object) -> str:
        raise AssertionError("the hub is not asked")

    for value in (Blocklist, Qwen3Guard, RetinaFaceFilter, snapshot_download):
        setattr(module, value.__name__, value)
    return {"cosmos_guardrail": types.ModuleType("cosmos_guardrail"), NAME: module}
