"""``evaluate.py tokenbench``: golden figures, pairs, refusals, failures and continuations."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.reference import SHIPPED_DIR

from cosmos_posttrain.errors import PartialFailureError, UserError
from cosmos_posttrain.evaluation import quality, tokenbench
from cosmos_posttrain.evaluation.config.tokenbench import TokenBenchConfig
from cosmos_posttrain.evaluation.pairs import find_pairs
from cosmos_posttrain.video import write_mp4

GOLDEN = SHIPPED_DIR / "tokenbench"


def frames(num_frames: int = 6, height: int = 32, width: int = 48, shift: int = 0) -> torch.Tensor:
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin((columns + rows / 2 + 3 * t + shift) / 7) for t in range(num_frames)]
    return torch.from_numpy((np.stack([waves] * 3) * 100 + 128).astype(np.uint8))


def two_folders(root: Path, names: tuple[str, ...] = ("a.mp4", "b.mp4", "c.mp4")) -> list[Path]:
    """References, and targets that are a little off."""
    for number, name in enumerate(names):
        write_mp4(root / "reference" / name, frames(shift=9 * number), fps=10)
        write_mp4(root / "target" / name, frames(shift=9 * number + 1 + number), fps=10)
    return [root / "reference", root / "target"]


def config_of(folders: list[Path], **changes: Any) -> TokenBenchConfig:
    values: dict[str, Any] = {"gtpath": str(folders[0]), "targetpath": str(folders[1])}
    return TokenBenchConfig(**(values | {"device": "cpu", "num_workers": 2} | changes))


def test_golden_figures(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "generated", tmp_path / "B")
    metrics = tokenbench.run(config_of([GOLDEN / "reference", tmp_path / "B"]))
    expected = json.loads((GOLDEN / "expected.json").read_text())
    for name, tolerance in (("psnr", 0.01), ("ssim", 0.0005)):
        listed = dict(json.loads((tmp_path / "B" / f"{name}.json").read_text()))
        assert listed == {
            f"{clip}.mp4": pytest.approx(expected[clip][name], abs=tolerance)
            for clip in ("clip0", "clip3")
        }
        assert metrics["figures"][name] == pytest.approx(expected["mean"][name], abs=tolerance)
    assert metrics["command"] == "tokenbench"
    assert [row["num_frames"] for row in metrics["rows"]] == [17, 17]
    assert json.loads((tmp_path / "B" / "metrics.json").read_text()) == metrics
    rows = list(csv.DictReader((tmp_path / "B" / "metrics.csv").read_text().splitlines()))
    assert [float(row["psnr"]) for row in rows] == [row["psnr"] for row in metrics["rows"]]


def test_first_frames_given_frames_and_sizes(tmp_path: Path) -> None:
    folders = two_folders(tmp_path, ("a.mp4",))
    # From frame 2 on the target is something else.
    changed = torch.cat([frames()[:, :2], 255 - frames()[:, 2:]], 1)
    write_mp4(folders[1] / "a.mp4", changed, fps=10)

    def psnr(**changes: Any) -> tuple[float, int]:
        row = tokenbench.run(config_of(folders, overwrite=True, **changes))["rows"][0]
        return row["psnr"], row["num_frames"]

    first, whole, rest = psnr(num_frames=2), psnr(), psnr(skip_frames=2, num_frames=5)
    assert (first[1], whole[1], rest[1]) == (2, 6, 3)
    assert rest[0] < whole[0] < first[0] - 10


def test_a_reference_is_cropped_as_inputs_of_models_are(tmp_path: Path) -> None:
    folders = two_folders(tmp_path, ("a.mp4",))
    doubled = frames().repeat_interleave(2, 2).repeat_interleave(2, 3)
    wide = torch.cat([doubled[..., :20], doubled, doubled[..., :20]], -1)
    write_mp4(folders[0] / "a.mp4", wide, fps=10)  # 136x64, where the target has 48x32
    write_mp4(folders[1] / "a.mp4", frames(), fps=10)
    row = tokenbench.run(config_of(folders, width=16, num_frames=2))["rows"][0]
    assert (row["height"], row["width"], row["num_frames"]) == (16, 24, 2)
    assert row["psnr"] > 30


def test_names_are_matched_and_the_others_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = [tmp_path / "reference", tmp_path / "target"]
    for name in ("a.mp4", "b.mov", "deep/c.mp4", "deep/d.mp4", "x/e.mp4", "y/e.mp4"):
        (folders[0] / name).parent.mkdir(parents=True, exist_ok=True)
        (folders[0] / name).touch()
    for name in ("a.mp4", "b.mp4", "c.mp4", "deep/d.mp4", "e.mp4", ".f.mp4", "notes.txt"):
        (folders[1] / name).parent.mkdir(parents=True, exist_ok=True)
        (folders[1] / name).touch()
    found = find_pairs(*folders, recursive=True)
    pairs = [(p.name, p.reference.relative_to(folders[0]).as_posix()) for p in found.pairs]
    assert pairs == [
        ("a.mp4", "a.mp4"),
        ("b.mp4", "b.mov"),
        ("c.mp4", "deep/c.mp4"),
        ("deep/d.mp4", "deep/d.mp4"),
    ]
    # Two references have the name of e.mp4, so that it could be either's.
    assert found.only_reference == ["x/e.mp4", "y/e.mp4"]
    assert found.only_target == ["e.mp4"]
    flat = find_pairs(*folders, recursive=False)
    assert [pair.name for pair in flat.pairs] == ["a.mp4", "b.mp4"]
    # Results of a model in a folder below its inputs.
    (folders[0] / "evals").mkdir()
    (folders[0] / "evals" / "a.mp4").touch()
    below = find_pairs(folders[0], folders[0] / "evals", recursive=True)
    assert [pair.reference for pair in below.pairs] == [folders[0] / "a.mp4"]
    assert "evals/a.mp4" not in below.only_reference

    small = two_folders(tmp_path / "small", ("a.mp4", "b.mp4"))
    (small[1] / "b.mp4").rename(small[1] / "other.mp4")
    metrics = tokenbench.run(config_of(small))
    assert metrics["only_reference"] == ["b.mp4"]
    said = capsys.readouterr().err
    assert f"only in {small[0]}: b.mp4" in said
    assert f"only in {small[1]}: other.mp4" in said
    assert "LPIPS needs --lpips_weights and rFVD needs --fvd_weights" in said


def test_an_unreadable_clip_is_named_after_the_rest_is_scored(tmp_path: Path) -> None:
    folders = two_folders(tmp_path)
    (folders[1] / "b.mp4").write_bytes(b"\0" * 100)
    for _ in range(2):  # the second run finds it complete
        with pytest.raises(PartialFailureError, match="1 of 3 pairs could not be read") as caught:
            tokenbench.run(config_of(folders))
        assert caught.value.exit_code == 1
    metrics = json.loads((folders[1] / "metrics.json").read_text())
    assert [row["video"] for row in metrics["rows"]] == ["a.mp4", "c.mp4"]
    assert [row["video"] for row in metrics["failures"]] == ["b.mp4"]
    assert str(folders[1] / "b.mp4") in metrics["failures"][0]["error"]
    assert len(json.loads((folders[1] / "psnr.json").read_text())) == 2
    assert tokenbench.run(config_of(folders, max_failures=1)) == metrics


def test_nothing_readable_is_a_failure(tmp_path: Path) -> None:
    folders = two_folders(tmp_path, ("a.mp4",))
    (folders[1] / "a.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(PartialFailureError, match="none of the pairs could be read"):
        tokenbench.run(config_of(folders, max_failures=9))
    assert not (folders[1] / "metrics.json").exists()


def test_a_killed_run_scores_no_pair_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folders = two_folders(tmp_path)
    whole = tokenbench.run(config_of(folders, output_dir=str(tmp_path / "whole")))
    compared: list[str] = []
    compare = tokenbench._compare

    def stop_at_b(pair: Any, *arguments: Any) -> Any:
        if pair.name == "b.mp4":
            raise KeyboardInterrupt
        return compare(pair, *arguments)

    config = config_of(folders, num_workers=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenbench, "_compare", stop_at_b)
        tokenbench.run(config)
    assert not (folders[1] / "metrics.json").exists()
    with pytest.raises(UserError, match=r"holds another .*\(skip_frames 1 here, 0 there\)"):
        tokenbench.run(config_of(folders, skip_frames=1))

    def counted(pair: Any, *arguments: Any) -> Any:
        compared.append(pair.name)
        return compare(pair, *arguments)

    monkeypatch.setattr(tokenbench, "_compare", counted)
    metrics = tokenbench.run(config)
    assert compared == ["b.mp4", "c.mp4"]
    assert metrics["rows"] == whole["rows"]
    assert "1 videos are done" in capsys.readouterr().out
    assert tokenbench.run(config) == metrics
    assert compared == ["b.mp4", "c.mp4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gtpath": ""}, "--gtpath is missing"),
        ({"gtpath": "nowhere"}, "folder nowhere does not exist"),
        ({"gtpath": "empty"}, r"empty \(0 videos\) and .* \(3 videos\) have no name in common"),
        ({"num_frames": 4, "skip_frames": 4}, "--skip_frames 4 leaves nothing of --num_frames 4"),
        ({"skip_frames": 6}, "--skip_frames 6 leaves nothing of a.mp4"),
        ({"width": 4}, "--width 4 must be at least 8"),
        ({"lpips_weights": "empty"}, r"LPIPS needs frames of 31x31 pixels, but some have 24"),
        ({"lpips_weights": "empty", "width": 64}, r"empty holds no alexnet\*.pth"),
        ({"fvd_weights": "empty/i3d.pt"}, "rFVD needs at least 2 pairs of 10 frames"),
    ],
)
def test_bad_usage_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = two_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    if "lpips_weights" in changes:
        changes = {"width": 24} | changes
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        tokenbench.run(config_of(folders, **changes))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_pairs_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    folders = two_folders(tmp_path)
    for name in ("b.mp4", "c.mp4"):
        write_mp4(folders[0] / name, frames(8), fps=10)
    with pytest.raises(UserError, match=r"b.mp4 has 6 .* reference 8.*--num_frames \(so have 1 "):
        tokenbench.run(config_of(folders))
    assert len(tokenbench.run(config_of(folders, num_frames=6))["rows"]) == 3
    with pytest.raises(UserError, match="a smaller --num_frames"):
        tokenbench.run(config_of(folders, num_frames=7, overwrite=True))
    write_mp4(folders[1] / "a.mp4", frames(6, 40, 48), fps=10)
    with pytest.raises(UserError, match=r"48x40 pixels and its reference 48x32.*with --width"):
        tokenbench.run(config_of(folders, num_frames=6, overwrite=True))


def test_another_programs_results_stay(tmp_path: Path) -> None:
    folders = two_folders(tmp_path, ("a.mp4",))
    (folders[1] / "psnr.json").write_text("[]")
    with pytest.raises(UserError, match=r"psnr.json is there already.*--output_dir"):
        tokenbench.run(config_of(folders))
    assert (folders[1] / "psnr.json").read_text() == "[]"
    assert len(tokenbench.run(config_of(folders, overwrite=True))["rows"]) == 1
    assert (folders[1] / "a.mp4").is_file()


def test_figures_by_frame_average_to_those_of_the_clip() -> None:
    clip, other = frames(), frames(shift=2)
    errors = [10 ** (-value / 10) for value in quality.psnr_by_frame(clip, other)]
    assert -10 * np.log10(np.mean(errors)) == pytest.approx(quality.psnr(clip, other))
    assert np.mean(quality.ssim_by_frame(clip, other)) == pytest.approx(quality.ssim(clip, other))
