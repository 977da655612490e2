"""A clip in a sentence: what moves where, in one of several wordings.

Flows in: a scene. Flows out: text. Each object that moves is named with its colour, shape and
direction, so that after still frames the text alone says what will happen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosmos_posttrain.toy_world.scene import Scene

if TYPE_CHECKING:
    import numpy as np

_VERBS = ("moves", "slides", "glides", "drifts", "is moving", "goes", "travels")
_STAYS = ("stays where it is", "stands still", "does not move")
_PUSHED = ("is pushed around", "moves where it is pushed", "gets pushes")
_WORDS = {
    "left": ("left", "to the left", "leftward"),
    "right": ("right", "to the right", "rightward"),
    "up": ("up", "upward", "towards the top"),
    "down": ("down", "downward", "towards the bottom"),
}
_JOINTS = (", and ", ", while ")
_CAMERA = ("The camera pans {}.", "The camera moves {}.", "The view shifts {}.")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Draws a wording of what happens in the clip."""

    def draw(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    article = draw(("the", "a"))
    clauses: list[str] = []
    for number, item in enumerate(scene.objects):
        if item.direction:
            words = draw(_WORDS.get(item.direction, (item.direction,)))
            happens = f"{draw(_VERBS)} {words}"
        else:
            is_pushed = scene.actions[:, 2 * number : 2 * number + 2].any()
            happens = draw(_PUSHED if is_pushed else _STAYS)
        name = f"{item.color} {item.shape}"
        joint = draw(_JOINTS) if clauses else ""
        clauses.append(f"{joint}{_with_article(article, name)} {happens}")
    text = "".join(clauses) + "."
    if scene.camera_direction:
        words = draw(_WORDS.get(scene.camera_direction, (scene.camera_direction,)))
        text += " " + draw(_CAMERA).format(words)
    return text[0].upper() + text[1:]


def _with_article(article: str, name: str) -> str:
    return f"an {name}" if article == "a" and name[0] in "aeiou" else f"{article} {name}"
