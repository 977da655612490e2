"""What may be asked for and what may be shown: the package ``cosmos-guardrail`` (extra guardrail).

Flows in: a folder with the guardrail's weights, as ``nvidia/Cosmos-1.0-Guardrail`` lays them out;
prompts, and frames (3, T, H, W) uint8. Flows out: a sentence for a prompt that is blocked; frames
in which faces are blurred. Without a folder nothing is checked, which a note says.

    FOLDER/blocklist/{custom,exact_match,whitelist,nltk_data}/    word lists, and what reads them
    FOLDER/face_blur_filter/Resnet50_Final.pth                    finds faces
    FOLDER/Qwen3Guard-Gen-0.6B/, or beside FOLDER                 judges prompts; may be missing
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError, TextError

_PACKAGE = "cosmos_guardrail.cosmos_guardrail"
_NEEDED = ("Blocklist", "RetinaFaceFilter", "snapshot_download")
_WORD_LISTS = tuple(f"blocklist/{name}" for name in ("custom", "exact_match", "whitelist"))
_FACES = "face_blur_filter/Resnet50_Final.pth"
_JUDGE = "Qwen3Guard-Gen-0.6B"
_INSTALL = "run pip install '.[guardrail]', or leave --guardrail_dir out"
# Frames that are searched for faces at once.
_NUM_FRAMES = 16


class Guardrail:
    """Checks prompts and blurs faces; its models are loaded when they are first needed.

    Args:
        folder: of the weights; None checks nothing.
        is_disabled: check nothing, and do not say so.

    Attributes:
        notes: sentences for the user.

    Raises:
        ConfigError: a folder without weights, or the package is not installed.
    """

    def __init__(self, folder: str | Path | None, is_disabled: bool = False) -> None:
        self.notes: tuple[str, ...] = ()
        self._folder = None if folder is None or is_disabled else Path(folder)
        self._texts: list[Any] | None = None
        self._faces: Any = None
        if self._folder is not None:
            _check_folder(self._folder)
            _import_package()
            if self._judge_folder() is None:
                self.notes = (
                    f"the guardrail checks prompts against its word lists only, because {folder} "
                    f"has no {_JUDGE}",
                )
        elif not is_disabled:
            self.notes = (
                "nothing was checked: no --guardrail_dir was given, so prompts are taken and faces "
                "shown as they are (--disable_guardrail says so and silences this)",
            )

    @property
    def is_active(self) -> bool:
        """Whether anything is checked."""
        return self._folder is not None

    def check_prompt(self, text: str) -> None:
        """Refuses a prompt that the guardrail blocks.

        Raises:
            TextError: it is blocked.
            ConfigError: the weights cannot be loaded.
            CosmosPosttrainError: it could not be judged.
        """
        if self._folder is None:
            return
        if self._texts is None:
            self._texts = self._load_texts(self._folder)
        for model in self._texts:
            with _sentences(self._folder):  # some of its files are read only now
                is_safe, message = model.is_safe(text)
            if not is_safe:
                raise TextError(
                    f"the guardrail blocks the prompt {text!r}; ask for something else."
                )
            # The package lets a prompt pass where its judge fails.
            if "unexpected error" in message.lower():
                raise CosmosPosttrainError(
                    f"the guardrail could not judge the prompt {text!r}; its {_JUDGE} is damaged "
                    "or does not fit the installed packages."
                )

    def blur_faces(self, frames: Tensor) -> Tensor:
        """Frames (3, T, H, W) uint8 on the CPU -> the same with faces made unrecognisable.

        Raises:
            ConfigError: the weights cannot be loaded.
            CosmosPosttrainError: the detector failed.
        """
        if self._folder is None:
            return frames
        if self._faces is None:
            self._faces = self._load_faces(self._folder)
        done = []
        for some in frames.split(_NUM_FRAMES, dim=1):
            pixels = some.permute(1, 2, 3, 0).contiguous().numpy().copy()  # changed in place
            try:
                blurred = self._faces.postprocess(pixels)
            except Exception as error:  # OpenCV's and torch's own; faces are not shown then
                raise CosmosPosttrainError(
                    f"the guardrail could not look for faces ({_reason(error)})."
                ) from error
            done.append(torch.from_numpy(blurred).permute(3, 0, 1, 2))
        return torch.cat(done, dim=1).contiguous()

    def release(self) -> None:
        """Frees the models; they are loaded again when they are needed."""
        self._texts = self._faces = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _judge_folder(self) -> Path | None:
        assert self._folder is not None
        for parent in (self._folder, self._folder.absolute().parent):
            if (parent / _JUDGE / "config.json").is_file():
                return parent / _JUDGE
        return None

    def _load_texts(self, folder: Path) -> list[Any]:
        judge = self._judge_folder()
        with _opened(folder) as package:
            models = [package.Blocklist()]
            if judge is not None:
                models.append(package.Qwen3Guard(str(judge)).to(launch.device()).eval())
        return models

    def _load_faces(self, folder: Path) -> Any:
        with _opened(folder) as package:
            return package.RetinaFaceFilter().to(launch.device())


def _check_folder(folder: Path) -> None:
    missing = [name for name in _WORD_LISTS if not _has_words(folder / name)]
    missing += [name for name in (_FACES,) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"--guardrail_dir {folder} has no {', '.join(missing)}; give a folder with the files "
            "of nvidia/Cosmos-1.0-Guardrail, or leave the flag out."
        )


def _has_words(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_file() for path in folder.iterdir())


def _import_package() -> Any:
    try:
        package = importlib.import_module(_PACKAGE)
    except (ImportError, RuntimeError) as error:  # the latter of libraries that do not fit torch
        missing = (getattr(error, "name", None) or "cosmos_guardrail").partition(".")[0]
        raise ConfigError(
            f"the guardrail needs the package {missing}, which cannot be imported "
            f"({_reason(error)}); {_INSTALL}."
        ) from error
    unknown = [name for name in _NEEDED if not hasattr(package, name)]
    if unknown:
        raise ConfigError(
            f"the installed cosmos-guardrail has no {', '.join(unknown)}; {_INSTALL}."
        )
    return package


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """The package, which asks the hub for its files, made to find them in the folder.

    Raises:
        ConfigError: they cannot be read.
    """
    package = _import_package()
    download = package.snapshot_download
    package.snapshot_download = lambda *_args, **_options: str(folder)
    try:
        with _sentences(folder):
            yield package
    finally:
        package.snapshot_download = download


@contextlib.contextmanager
def _sentences(folder: Path) -> Iterator[None]:
    """Turns what is raised by files that are missing or damaged into one sentence."""
    try:
        yield
    except Exception as error:  # whatever torch, nltk and the package make of such files
        raise ConfigError(
            f"--guardrail_dir {folder} cannot be used ({_reason(error)}); fetch "
            "nvidia/Cosmos-1.0-Guardrail again."
        ) from error


def _reason(error: Exception) -> str:
    """The first words of an error."""
    lines = [line.strip("* ") for line in str(error).splitlines()]
    return next((line.rstrip(".:") for line in lines if line), type(error).__name__)
