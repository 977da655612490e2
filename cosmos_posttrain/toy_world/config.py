"""Settings and flags of ``python -m cosmos_posttrain.toy_world``. No torch.

Flows in: the command line. Flows out: a ``ToyWorldConfig``, and the ``WorldSettings`` that it
means, the level's own where nothing else was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting

SPLITS = ("train", "val", "test")
GROUNDS = ("calm", "textured")
CAMERAS = ("still", "moving")
DIRECTION_SETS = ("4", "8", "any")
SHAPES = ("ball", "box", "diamond")
# Light, so that they stand out from the dark ground by brightness too: the tiny tokenizers keep
# brightness better than hue.
PALETTE = {
    "white": (250, 250, 250),
    "red": (255, 105, 90),
    "blue": (130, 185, 255),
    "yellow": (250, 235, 120),
    "orange": (255, 165, 90),
    "green": (120, 245, 140),
    "pink": (255, 140, 205),
    "purple": (195, 140, 255),
}
# The first of them stay apart after tokenizing: clips with several objects take theirs from these.
NUM_DISTINCT = 4
MAX_OBJECTS = 3
# Share of the picture's shorter side that the camera moves at most.
MAX_TRAVEL = 0.25
# A number of 1.0 in an action changes a velocity by so many pixels a frame.
ACTION_SCALE = 4.0


@dataclass(frozen=True)
class WorldSettings:
    """All that decides a clip, besides the seed, the split and its number.

    Attributes:
        height: pixels.
        width: pixels.
        num_frames: of a clip.
        fps: frames a second.
        still_frames: so many first frames are the same.
        num_objects: of a clip.
        colors: names in ``PALETTE`` to draw from.
        shapes: names in ``SHAPES`` to draw from.
        diameter: least and largest, in pixels, of a disc of the object's area.
        speed: least and largest, in pixels a frame.
        directions: one of ``DIRECTION_SETS``.
        ground: one of ``GROUNDS``.
        camera: one of ``CAMERAS``.
        bounces: objects may reach the walls, and come back.
        push_probability: chance of a push, for each object and pair of neighbouring frames.
        friction: share of the velocity that is lost from frame to frame.
    """

    height: int
    width: int
    num_frames: int
    fps: float
    still_frames: int
    num_objects: int
    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    diameter: tuple[float, float]
    speed: tuple[float, float]
    directions: str
    ground: str
    camera: str
    bounces: bool
    push_probability: float
    friction: float

    @property
    def moving_steps(self) -> int:
        """Steps from frame to frame in which something moves."""
        return self.num_frames - max(self.still_frames, 1)


_LEVELS: dict[str, dict[str, Any]] = {
    "simple": dict(
        num_objects=1, shapes=("ball",), directions="4", ground="calm", camera="still",
        bounces=False, push_probability=0.0, friction=0.0,
    ),
    "bouncing": dict(
        num_objects=2, shapes=SHAPES, directions="any", ground="calm", camera="still",
        bounces=True, push_probability=0.0, friction=0.0,
    ),
    "pushed": dict(
        num_objects=1, shapes=("ball",), directions="4", ground="calm", camera="still",
        bounces=True, push_probability=0.5, friction=1.0,
    ),
    "rich": dict(
        num_objects=3, shapes=SHAPES, directions="any", ground="textured", camera="moving",
        bounces=True, push_probability=0.04, friction=0.0,
    ),
}  # fmt: skip
LEVELS = tuple(_LEVELS)


@dataclass
class ToyWorldConfig:
    """A folder of clips to render.

    Attributes:
        output: folder to write.
        num_videos: clips in all.
        num_val: of these, for validation; None means a tenth.
        num_test: of these, for tests; None means a tenth.
        seed: of everything; the same one gives the same bytes.
        level: ``simple`` (one object, straight on), ``bouncing`` (two, off the walls and behind
            each other), ``pushed`` (one, that moves only where it is pushed) or ``rich`` (three,
            pushes, textured ground, moving camera); the settings below replace the level's own.
        width: pixels, even.
        height: pixels, even.
        num_frames: frames of a clip.
        fps: frames a second.
        still_frames: so many first frames are the same, so that the caption alone says what moves
            where after them.
        num_objects: objects of a clip, at most 3.
        colors: names to draw from, separated by commas.
        shapes: names to draw from, separated by commas.
        diameter: pixels, or least,largest.
        speed: pixels a frame, or least,largest.
        directions: where objects set out for: ``4`` (left, right, up, down), ``8`` or ``any``.
        ground: ``calm`` or ``textured``.
        camera: ``still`` or ``moving``.
        bounces: objects may reach the walls, and come back.
        push_probability: chance of a push, for each object and pair of neighbouring frames.
        friction: share of the velocity that is lost from frame to frame; with 1 an object moves
            only where it is pushed.
        num_workers: clips rendered at a time; does not change a byte.
        overwrite: delete an earlier world in the output folder and start anew.
    """

    output: str = ""
    num_videos: int = setting(1000, at_least=1)
    num_val: int | None = setting(None, at_least=0)
    num_test: int | None = setting(None, at_least=0)
    seed: int = setting(0, at_least=0)
    level: str = setting("simple", choices=LEVELS)
    width: int = setting(160, at_least=32, at_most=4096)
    height: int = setting(96, at_least=32, at_most=4096)
    num_frames: int = setting(17, at_least=1, at_most=1000)
    fps: float = setting(10.0, above=0, below=1000)
    still_frames: int = setting(0, at_least=0)
    num_objects: int | None = setting(None, at_least=1, at_most=MAX_OBJECTS)
    colors: str | None = None
    shapes: str | None = None
    diameter: str = "28"
    speed: str = "1.5,3"
    directions: str | None = setting(None, choices=DIRECTION_SETS)
    ground: str | None = setting(None, choices=GROUNDS)
    camera: str | None = setting(None, choices=CAMERAS)
    bounces: bool | None = None
    push_probability: float | None = setting(None, at_least=0, at_most=1)
    friction: float | None = setting(None, at_least=0, at_most=1)
    num_workers: int = setting(2, at_least=1)
    overwrite: bool = False


FLAGS = (
    Flag("--output", aliases=("--output_dir",)),
    Flag("--num_videos"),
    Flag("--num_val"),
    Flag("--num_test"),
    Flag("--seed"),
    Flag("--level"),
    Flag("--width"),
    Flag("--height"),
    Flag("--num_frames"),
    Flag("--fps"),
    Flag("--still_frames"),
    Flag("--num_objects"),
    Flag("--colors"),
    Flag("--shapes"),
    Flag("--diameter"),
    Flag("--speed"),
    Flag("--directions"),
    Flag("--ground"),
    Flag("--camera"),
    Flag("--bounces"),
    Flag("--push_probability"),
    Flag("--friction"),
    Flag("--num_workers"),
    Flag("--overwrite"),
)


def counts(config: ToyWorldConfig) -> dict[str, int]:
    """Clips of each split."""
    val, test = (
        config.num_videos // 10 if number is None else number
        for number in (config.num_val, config.num_test)
    )
    return {"train": config.num_videos - val - test, "val": val, "test": test}


def validate(config: ToyWorldConfig) -> WorldSettings:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = [] if config.output else ["--output is missing: name a new or empty folder"]
    numbers = counts(config)
    if numbers["train"] < 0:
        problems.append(
            f"--num_val {numbers['val']} and --num_test {numbers['test']} are more than "
            f"--num_videos {config.num_videos}"
        )
    for name in ("width", "height"):
        if getattr(config, name) % 2:
            problems.append(f"--{name} {getattr(config, name)} must be even")
    if config.still_frames > config.num_frames:
        problems.append(
            f"--still_frames {config.still_frames} must be at most --num_frames {config.num_frames}"
        )
    settings = _resolve(config, problems)
    if not problems:
        problems += _room_problems(settings)
    check(config, flag_names(FLAGS), problems)
    return settings


def _resolve(config: ToyWorldConfig, problems: list[str]) -> WorldSettings:
    """The level's settings with the config's own; what cannot be read is added to the problems."""
    level = _LEVELS.get(config.level, _LEVELS["simple"])
    own = {key: getattr(config, key) for key in level if getattr(config, key) is not None}
    chosen = level | own
    number = min(max(chosen["num_objects"], 1), MAX_OBJECTS)
    colors = tuple(PALETTE) if number == 1 else tuple(PALETTE)[:NUM_DISTINCT]
    chosen["shapes"] = _names("shapes", config.shapes, level["shapes"], SHAPES, problems)
    chosen["colors"] = _names("colors", config.colors, colors, tuple(PALETTE), problems)
    if 0 < len(chosen["colors"]) < number:
        problems.append(f"--colors must name at least {number}, one for each object of a clip")
    chosen["diameter"] = _range("diameter", config.diameter, 4.0, problems)
    chosen["speed"] = _range("speed", config.speed, 0.0, problems)
    same = ("height", "width", "num_frames", "fps", "still_frames")
    return WorldSettings(**chosen, **{name: getattr(config, name) for name in same})


def _names(
    name: str,
    given: str | None,
    default: tuple[str, ...],
    known: tuple[str, ...],
    problems: list[str],
) -> tuple[str, ...]:
    if given is None:
        return default
    names = tuple(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))
    unknown = [item for item in names if item not in known]
    if unknown or not names:
        problems.append(f"--{name} {given} must name some of {', '.join(known)}")
    return names


def _range(name: str, given: str, least: float, problems: list[str]) -> tuple[float, float]:
    try:
        values = [float(part) for part in str(given).split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not least <= values[0] <= values[1] < 1e4:
        problems.append(
            f"--{name} {given} must be a number of pixels from {least:g} up, or least,largest"
        )
        return (least, least)
    return (values[0], values[1])


def _room_problems(settings: WorldSettings) -> list[str]:
    """Objects must fit into the picture, with their way where they may not reach the walls."""
    side, size = min(settings.height, settings.width), settings.diameter[1]
    problems = []
    # A diamond's tips lie 1.25 diameters apart, and walls may stand in from all sides.
    largest = side * (0.5 if settings.camera == "still" else (1 - 2 * MAX_TRAVEL) / 1.254)
    if size > largest:
        problems.append(
            f"--diameter {size:g} must be at most {largest:.1f} in a picture of "
            f"{settings.width}x{settings.height} with a {settings.camera} camera"
        )
    if settings.bounces or settings.friction == 1:
        return problems
    # Where the first frames are still, the place must not tell the direction: room for all of them.
    ways = 2 if settings.still_frames > 1 else 1
    need = size + 1 + ways * settings.speed[1] * settings.moving_steps
    if need > side:
        problems.append(
            f"an object of --diameter {size:g} at --speed {settings.speed[1]:g} needs {need:g} of "
            f"the picture's {side} pixels in {settings.moving_steps} steps: give --bounces, less "
            "speed, fewer moving frames or a larger picture"
        )
    return problems
