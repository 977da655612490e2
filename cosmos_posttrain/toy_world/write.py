"""Renders a small world: clips with their annotations and truth, and lists of prompts.

Flows in: a ``ToyWorldConfig``. Flows out:

    videos/SPLIT/ID/rgb.mp4      annotation/SPLIT/ID.json   as the robot data has them
    truth/SPLIT/ID.json          a ``WorldTruth``
    prompts.jsonl                {"prompt", "visual_input"} a line; prompts_SPLIT.jsonl of one split
    world.json                   seed, settings and counts

A clip is a function of settings, seed, split and number alone: a killed run is continued by the
same command, and clips can be added to a complete folder.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain import files, launch
from cosmos_posttrain.errors import SaveError
from cosmos_posttrain.evaluation.world_truth import WorldTruth, truth_path
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.toy_world.captions import caption
from cosmos_posttrain.toy_world.config import (
    SPLITS,
    ToyWorldConfig,
    WorldSettings,
    counts,
    validate,
)
from cosmos_posttrain.toy_world.folder import PROMPTS, ClipId, WorldFolder
from cosmos_posttrain.toy_world.render import render
from cosmos_posttrain.toy_world.scene import draw_scene
from cosmos_posttrain.video import write_mp4

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Changes when the same settings and seed give other clips.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class RenderedClip:
    """All that is written of a clip.

    Attributes:
        frames: (T, H, W, 3) uint8.
        truth: of these frames.
        actions: (T - 1, 7) float64, see ``Scene``.
    """

    frames: NDArray[np.uint8]
    truth: WorldTruth
    actions: NDArray[np.float64]


def make_clip(settings: WorldSettings, seed: int, clip: ClipId) -> RenderedClip:
    """Draws and renders one clip."""
    rng = np.random.default_rng([seed, SPLITS.index(clip.split), clip.number])
    scene = draw_scene(settings, rng)
    text = caption(scene, rng)
    frames, visible = render(scene, settings.height, settings.width, settings.ground)
    truth = WorldTruth(
        scene.objects,
        scene.positions - scene.camera[:, None],
        scene.velocities,
        visible,
        scene.camera,
        settings.height,
        settings.width,
        settings.fps,
        settings.still_frames,
        text,
    )
    return RenderedClip(frames, truth, scene.actions)


def annotation(clip: ClipId, rendered: RenderedClip) -> dict[str, Any]:
    """A clip's annotation, with the keys of the robot data.

    ``state`` has 7 numbers a frame: x and y of three objects as shares of the picture, 0 for
    objects that are not there, then 1 where a push follows; for ``action`` see ``Scene``.
    """
    truth = rendered.truth
    is_pushed = np.append(rendered.actions[:, -1], 0.0)
    places = (truth.positions / [truth.width, truth.height]).reshape(len(is_pushed), -1)
    state = np.zeros((len(is_pushed), rendered.actions.shape[1]))
    state[:, : places.shape[1]] = np.round(places, 6)
    state[:, -1] = is_pushed
    return {
        "task": "toy_world",
        "texts": [truth.caption],
        "videos": [{"video_path": clip.video}],
        "action": rendered.actions.tolist(),
        "state": state.tolist(),
        "continuous_gripper_state": is_pushed.tolist(),
        "episode_id": clip.name,
    }


def write_world(config: ToyWorldConfig) -> None:
    """Renders a world, or continues one, or finds it complete.

    Raises:
        ConfigError: lists every problem of the settings.
        OutputFolderError: the folder holds something else, is being written, or is too full.
        SaveError: it could not be written to the end; the same command goes on.
    """
    settings = validate(config)
    numbers = counts(config)
    plan = {
        "version": VERSION,
        "seed": config.seed,
        "settings": dataclasses.asdict(settings),
        "counts": numbers,
    }
    folder = WorldFolder(Path(config.output), plan)
    folder.check(config.overwrite)
    clips = [ClipId(split, number) for split in SPLITS for number in range(numbers[split])]
    parts = ", ".join(f"{split} {number:,}" for split, number in numbers.items() if number)
    summary = f"{len(clips):,} clips ({parts})"
    try:
        with files.locked(folder.path):
            if config.overwrite:
                folder.remove()
            if folder.is_complete():
                launch.say(f"{folder.path} is complete already: {summary}; nothing to do.")
                return
            folder.start()
            _render_missing(folder, settings, config, clips)
            _write_prompts(folder.path, clips)
            folder.finish()
    except OSError as error:
        raise SaveError(
            f"{folder.path} cannot be written ({error.strerror or error}); make room or mend it, "
            "then run the same command again: finished clips stay."
        ) from error
    launch.say(f"rendered {summary} in {folder.path}.")


def _render_missing(
    folder: WorldFolder, settings: WorldSettings, config: ToyWorldConfig, clips: list[ClipId]
) -> None:
    """Renders what is not there yet, a few clips at a time."""
    to_do = folder.missing(clips)
    num_done = len(clips) - len(to_do)
    if num_done:
        launch.say(f"continuing {folder.path}: {num_done:,} clips are done.")
    files.check_free_space(folder.path, _num_bytes(settings) * len(to_do), f"{len(to_do):,} clips")
    progress = ProgressDisplay(len(clips), "clips", "small world", num_done)
    waiting = iter(to_do)
    running: set[Future[None]] = set()
    with ThreadPoolExecutor(config.num_workers) as pool:
        while True:
            # Few are under way, so that a failure or Ctrl-C ends the run soon.
            for clip in islice(waiting, 2 * config.num_workers - len(running)):
                running.add(pool.submit(_write_clip, folder.path, settings, config.seed, clip))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
                progress.advance()


def _write_clip(folder: Path, settings: WorldSettings, seed: int, clip: ClipId) -> None:
    rendered = make_clip(settings, seed, clip)
    video = folder / clip.video
    video.parent.mkdir(exist_ok=True)
    files.remove_leftovers(video.parent)
    write_mp4(video, rendered.frames.transpose(3, 0, 1, 2), settings.fps)
    rendered.truth.save(truth_path(video))
    text = files.json_text(annotation(clip, rendered))
    files.write_text(folder / clip.annotation, text + "\n")


def _num_bytes(settings: WorldSettings) -> int:
    """What a clip takes at most, about: the mp4, two JSON files, and blocks of the file system."""
    pixels = settings.height * settings.width * settings.num_frames
    return 16_000 + pixels // 10 + settings.num_frames * 400


def _write_prompts(folder: Path, clips: list[ClipId]) -> None:
    """Writes the lists that ``prepare_dataset.py --input_jsonl`` reads."""
    lines: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for clip in clips:
        text = WorldTruth.load(truth_path(folder / clip.video)).caption
        lines[clip.split].append({"prompt": text, "visual_input": clip.video})
    for split, own in lines.items():
        if own:
            files.write_json_lines(folder / f"{PROMPTS}_{split}.jsonl", own)
    files.write_json_lines(
        folder / f"{PROMPTS}.jsonl", [line for own in lines.values() for line in own]
    )
