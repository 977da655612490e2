"""The shipped encoder: small, made by its recipe, of any text, and no prompt like another."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import t5
from helpers.distributed_run import run_script
from safetensors.torch import load_file

from cosmos_posttrain.models.presets import PRESETS
from cosmos_posttrain.text import TextEncoder, load_text_encoder

RECIPES_DIR = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES_DIR))
import tiny_text_encoder as recipe  # noqa: E402

MOTIONS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


@pytest.fixture(scope="module")
def tiny() -> TextEncoder:
    return load_text_encoder("tiny", device="cpu")


def test_it_is_what_the_tiny_model_takes_and_small(tiny: TextEncoder) -> None:
    config = PRESETS["tiny-video2world"]
    assert (tiny.width, tiny.context_len) == (config.context_dim, config.context_len)
    assert sum(path.stat().st_size for path in t5.TINY.iterdir()) < 800_000


@pytest.mark.slow
def test_the_recipe_makes_it_again(tmp_path: Path) -> None:
    finished = run_script([RECIPES_DIR / "tiny_text_encoder.py", tmp_path])
    assert finished.returncode == 0, finished.stderr
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        made, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path, t5.TINY))
        assert made == shipped, name
    made, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path, t5.TINY))
    assert made.keys() == shipped.keys()
    for name, tensor in shipped.items():
        # Another build of torch may round the random numbers' logarithms otherwise.
        torch.testing.assert_close(made[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_words_of_its_captions_are_one_token_each(tiny: TextEncoder) -> None:
    captions = list(itertools.islice(recipe.captions(), 200))
    for caption, tokens in zip(captions, tiny.tokenize(captions), strict=True):
        marks = sum(caption.count(mark) for mark in ".;,")
        assert len(tokens.ids) == len(caption.split()) + marks + 1, caption


def test_any_text_can_be_told_from_any_other(tiny: TextEncoder) -> None:
    strange = ["漢", "字", "é", "ê", "😀", "😃", "\u202eabc", "abc", "\x00", "naïveté", "x" * 40]
    tokens = tiny.tokenize(strange)
    assert len({item.ids for item in tokens}) == len(strange)
    assert all(2 not in item.ids for item in tokens)  # <unk>


def test_one_other_word_makes_another_embedding(tiny: TextEncoder) -> None:
    """The row of the word that differs is another row; the others change with it a little."""
    caption = "the {} {} moves {} while the camera rests"
    words = itertools.product(recipe.COLORS[:6], recipe.OBJECTS[:6], MOTIONS.values())
    rows = {item: tiny.encode([caption.format(*item)])[0] for item in words}
    for place in (0, 1):
        for item in itertools.islice(rows, 40):
            for other in (recipe.COLORS, recipe.OBJECTS)[place][:6]:
                changed = (*item[:place], other, *item[place + 1 :])
                if changed == item:
                    continue
                a, b = rows[item], rows[changed]
                distance = (a - b).norm(dim=1) / a.norm(dim=1)
                row = 1 + place
                # Two independent rows of one length are 1.41 times their length apart.
                assert distance[row] > 0.8
                assert distance[torch.arange(len(a)) != row].mean() < 0.4


def test_a_linear_probe_reads_the_direction_out_of_unseen_captions(tiny: TextEncoder) -> None:
    """Of four patterns with all colors and objects; held out are whole pairs of the two."""
    patterns = [pattern.replace("{place}", "{motion}") for pattern in recipe.PATTERNS]
    verbs, looks = itertools.cycle(recipe.VERBS[:8]), itertools.cycle(recipe.LOOKS)
    sets: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    pairs = itertools.product(enumerate(recipe.COLORS), enumerate(recipe.OBJECTS[:12]))
    for (i, color), (j, thing) in pairs:
        for number, motion in enumerate(MOTIONS.values()):
            pattern = patterns[(i + j + number) % len(patterns)]
            words = {"color": color, "object": thing, "motion": motion}
            caption = pattern.format(**words, verb=next(verbs), look=next(looks))
            sets[(i + j) % 3 == 0].append((caption, number))

    def features(held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        rows = tiny.encode([caption for caption, _ in sets[held_out]], batch_size=64)
        means = torch.stack([row.mean(0) for row in rows])
        ones = torch.ones(len(means), 1)
        return torch.cat([means, ones], 1), torch.tensor([n for _, n in sets[held_out]])

    x, y = features(False)
    target = torch.nn.functional.one_hot(y, 4).float()
    weights = torch.linalg.lstsq(x, target).solution
    x, y = features(True)
    assert ((x @ weights).argmax(1) == y).float().mean() > 0.97
