"""The guardrail: what it refuses, what it blurs, and what it says where nothing is checked.

Its package brings detectors and a language model that few install. Where it is missing, a module
of the same names stands in for it; where it is there, ``test_the_package_itself`` runs it on
weights without training.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import guardrail_case
from helpers.guardrail_case import NAME

from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError, TextError
from cosmos_posttrain.inference.guardrail import Guardrail


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return guardrail_case.write_folder(tmp_path / "weights")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    modules = guardrail_case.stand_in()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    download = modules[NAME].snapshot_download
    yield modules[NAME]
    assert modules[NAME].snapshot_download is download  # put back


def test_without_weights_one_sentence_says_that_nothing_was_checked() -> None:
    guardrail = Guardrail(None)
    assert len(guardrail.notes) == 1 and guardrail.notes[0].startswith("nothing was checked: ")
    assert Guardrail(None, is_disabled=True).notes == ()
    frames = torch.full((3, 2, 4, 4), 255, dtype=torch.uint8)
    guardrail.check_prompt("customword")
    assert guardrail.blur_faces(frames) is frames and not guardrail.is_active


@pytest.mark.parametrize(
    "missing", ["blocklist/custom/words.txt", "face_blur_filter/Resnet50_Final.pth", ""]
)
def test_a_folder_without_weights_is_refused(folder: Path, missing: str) -> None:
    if missing:
        (folder / missing).unlink()
        named = missing.removesuffix("/words.txt")
    else:
        folder, named = folder / "elsewhere", "blocklist/custom"
    with pytest.raises(ConfigError, match=rf"--guardrail_dir .* has no {named}") as caught:
        Guardrail(folder)
    assert str(caught.value).count("\n") == 0


@pytest.mark.skipif("cosmos_guardrail" in sys.modules, reason="the package is there")
def test_a_missing_package_is_named_with_its_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[guardrail\]'"):
        Guardrail(folder)


def test_prompts_are_blocked_by_words_and_by_the_judge(
    folder: Path, package: types.ModuleType
) -> None:
    guardrail = Guardrail(folder)
    assert "word lists only" in guardrail.notes[0]
    guardrail.check_prompt("a rude ball")
    with pytest.raises(TextError, match="blocks the prompt 'a customword ball'"):
        guardrail.check_prompt("a customword ball")
    judge = folder.parent / "Qwen3Guard-Gen-0.6B"
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    judged = Guardrail(folder)
    assert judged.notes == ()
    judged.check_prompt("a ball")
    with pytest.raises(TextError, match="blocks the prompt"):
        judged.check_prompt("a rude ball")
    # The package calls a prompt safe that it failed to judge.
    (judge / "config.json").write_text('"broken"')
    judged.release()
    with pytest.raises(CosmosPosttrainError, match="could not judge"):
        judged.check_prompt("a ball")


def test_faces_are_blurred_and_the_frames_that_came_in_stay(
    folder: Path, package: types.ModuleType
) -> None:
    frames = torch.randint(0, 256, (3, 37, 4, 6), dtype=torch.uint8)
    before = frames.clone()
    blurred = Guardrail(folder).blur_faces(frames)
    assert torch.equal(frames, before)
    assert torch.equal(blurred, torch.where(before > 200, 0, before))


def test_damaged_weights_are_one_sentence(folder: Path, package: types.ModuleType) -> None:
    (folder / "face_blur_filter" / "Resnet50_Final.pth").write_bytes(b"other")
    with pytest.raises(ConfigError, match=r"cannot be used \(invalid load key\)") as caught:
        Guardrail(folder).blur_faces(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
    assert "\n" not in str(caught.value)


def write_real_weights(package: types.ModuleType, folder: Path) -> None:
    """Word lists, nltk's data without words, and a detector that takes everything for a face."""
    for name, word in (("custom", "forbidden"), ("exact_match", "barred thing")):
        (folder / "blocklist" / name / "words.txt").write_text(f"{word}\n")
    data = folder / "blocklist" / "nltk_data"
    english, wordnet = data / "tokenizers/punkt_tab/english", data / "corpora/wordnet"
    for place, names in (
        (english, "collocations.tab sent_starters.txt abbrev_types.txt ortho_context.tab"),
        (wordnet, "index.sense"),
        *(
            (wordnet, f"index.{kind} data.{kind} {kind}.exc")
            for kind in "noun verb adj adv".split()
        ),
    ):
        place.mkdir(parents=True, exist_ok=True)
        for name in names.split():
            (place / name).write_text("")
    (wordnet / "lexnames").write_text("00\tadj.all\t3\n")
    net = package.RetinaFace(cfg={**package.cfg_re50, "pretrain": False}, phase="test")
    heads = {
        f"module.{name}": torch.zeros_like(value)
        for name, value in net.state_dict().items()
        if name.startswith(("ClassHead", "BboxHead"))
    }
    for name, value in heads.items():
        if "ClassHead" in name and name.endswith("bias"):
            value.view(-1, 2)[:] = torch.tensor([-5.0, 5.0])
    torch.save(heads, folder / "face_blur_filter" / "Resnet50_Final.pth")


@pytest.mark.filterwarnings("ignore")
def test_the_package_itself(folder: Path) -> None:
    reason = "the extra guardrail is not installed"
    package = pytest.importorskip(NAME, reason=reason, exc_type=ImportError)
    write_real_weights(package, folder)
    guardrail = Guardrail(folder)
    guardrail.check_prompt("a red ball rolls")
    for text in ("a forbidden ball", "the barred thing"):
        with pytest.raises(TextError, match="blocks the prompt"):
            guardrail.check_prompt(text)
    frames = torch.randint(0, 256, (3, 5, 64, 96), dtype=torch.uint8)
    blurred = guardrail.blur_faces(frames)
    assert blurred.shape == frames.shape and blurred.dtype == torch.uint8
    assert (blurred != frames).float().mean() > 0.5
    guardrail.release()
    (folder / "face_blur_filter" / "Resnet50_Final.pth").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="cannot be used"):
        guardrail.blur_faces(frames)
