"""LPIPS and rFVD with networks of known weights: files in the published names, closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.evaluation import fvd, tokenbench
from cosmos_posttrain.evaluation.config.tokenbench import TokenBenchConfig
from cosmos_posttrain.evaluation.lpips import load_lpips
from cosmos_posttrain.video import write_mp4

CPU = torch.device("cpu")


def write_lpips(folder: Path) -> dict[str, Tensor]:
    """Random weights under the names of the two published files."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / int(np.prod(shape[1:])) ** 0.5

    layers = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3)}
    layers |= {8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    backbone = {f"features.{n}.weight": normal(*shape) for n, shape in layers.items()}
    backbone |= {f"features.{n}.bias": normal(shape[0]) / 10 for n, shape in layers.items()}
    linear = {
        f"lin{i}.model.1.weight": normal(1, shape[0], 1, 1).abs()
        for i, shape in enumerate(layers.values())
    }
    torch.save(backbone | {"classifier.1.bias": torch.zeros(3)}, folder / "alexnet-owt-x.pth")
    torch.save(linear, folder / "alex.pth")
    return backbone | linear


def test_lpips_is_the_papers_sum(tmp_path: Path) -> None:
    weights = write_lpips(tmp_path / "lpips")
    network = load_lpips(tmp_path / "lpips", CPU)
    x, y = torch.rand(2, 2, 3, 48, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = network(x, y)
    assert found.shape == (2,)
    assert torch.equal(network(x, x), torch.zeros(2))
    torch.testing.assert_close(network(y, x), found)

    def features(frames: Tensor) -> list[Tensor]:
        shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        out = (frames - shift) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        layers = []
        for number, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            kernel, bias = (weights[f"features.{number}.{part}"] for part in ("weight", "bias"))
            out = F.conv2d(out, kernel, bias, stride, padding).clamp_min(0)
            layers.append(F.normalize(out, dim=1, eps=1e-10))
            if number in (0, 3):
                out = F.max_pool2d(out, 3, 2)
        return layers

    expected = torch.zeros(2)
    for i, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
        expected += F.conv2d((a - b) ** 2, weights[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
    torch.testing.assert_close(found, expected)


def test_lpips_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    write_lpips(tmp_path / "lpips")
    torch.save({"lin0.model.1.weight": torch.ones(3)}, tmp_path / "lpips" / "alex.pth")
    with pytest.raises(ConfigError, match=r"other weights than LPIPS'.*leave --lpips_weights out"):
        load_lpips(tmp_path / "lpips", CPU)
    (tmp_path / "lpips" / "alex.pth").write_bytes(b"text")
    with pytest.raises(ConfigError, match="not a readable weights file"):
        load_lpips(tmp_path / "lpips", CPU)
    (tmp_path / "lpips" / "alex.pth").unlink()
    with pytest.raises(ConfigError, match=r"holds no alex.pth"):
        load_lpips(tmp_path / "lpips", CPU)


class SmallI3D(nn.Module):
    """Takes what the usual file takes: mean and spread of each channel."""

    def forward(self, video: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert not rescale and not resize and return_features
        assert video.shape[1] == 3 and video.shape[3] == 224 and video.shape[4] == 224
        flat = video.flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], 1)


def write_i3d(path: Path) -> Path:
    torch.jit.script(SmallI3D()).save(str(path))
    return path


def test_the_distance_of_two_normal_distributions() -> None:
    rng = np.random.default_rng(0)
    # Of independent numbers: |m - n|^2 + sum (s - t)^2 with the standard deviations s, t.
    left, right = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3)) * [2, 1, 3] + [1, 0, 2]
    sums = fvd.no_moments(3)
    for pair in zip(left, right, strict=True):
        for name, value in fvd.moments(*pair).items():
            sums[name] = sums[name] + value
    assert fvd.distance(sums, 4000) == pytest.approx(5 + 1 + 0 + 4, rel=0.05)
    same = {name.replace("target", "reference"): value for name, value in sums.items()}
    same |= {name.replace("reference", "target"): value for name, value in same.items()}
    assert fvd.distance(same, 4000) == pytest.approx(0, abs=1e-9)
    # Fewer clips than features: the covariance has no full rank.
    few = fvd.no_moments(3)
    for pair in zip(left[:2], right[:2], strict=True):
        for name, value in fvd.moments(*pair).items():
            few[name] = few[name] + value
    assert np.isfinite(fvd.distance(few, 2))


def test_other_files_are_no_i3d(tmp_path: Path) -> None:
    (tmp_path / "i3d.pt").write_bytes(b"text")
    with pytest.raises(ConfigError, match=r"cannot be loaded; give i3d_torchscript.pt"):
        fvd.I3D(tmp_path / "i3d.pt", CPU)
    torch.jit.script(nn.ReLU()).save(str(tmp_path / "relu.pt"))
    with pytest.raises(ConfigError, match="is another network"):
        fvd.I3D(tmp_path / "relu.pt", CPU)


def test_tokenbench_reports_both_where_there_are_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lpips(tmp_path / "lpips")
    rng = np.random.default_rng(0)
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        clip = rng.integers(0, 255, (3, 10, 4, 4)).repeat(8, 2).repeat(8, 3).astype(np.uint8)
        write_mp4(tmp_path / "reference" / name, clip, fps=10)
        write_mp4(tmp_path / "target" / name, (clip * 0.8).astype(np.uint8), fps=10)
    config = TokenBenchConfig(
        gtpath=str(tmp_path / "reference"),
        targetpath=str(tmp_path / "target"),
        lpips_weights=str(tmp_path / "lpips"),
        fvd_weights=str(write_i3d(tmp_path / "i3d.pt")),
        device="cpu",
        num_workers=1,
    )
    compare = tokenbench._compare

    def stop_at_c(pair: tokenbench.Pair, *arguments: object) -> object:
        if pair.name == "c.mp4":
            raise KeyboardInterrupt
        return compare(pair, *arguments)  # type: ignore[arg-type]

    # rFVD is of all clips together, also of those that a killed run has seen.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenbench, "_compare", stop_at_c)
        tokenbench.run(config)
    metrics = tokenbench.run(config)
    config.output_dir = str(tmp_path / "whole")
    whole = tokenbench.run(config)
    assert metrics["figures"] == whole["figures"]
    assert metrics["figures"]["rfvd"] > 0
    assert metrics["figures"]["lpips"] > 0
    assert (tmp_path / "target" / "lpips.json").is_file()
    config.targetpath, config.output_dir = config.gtpath, str(tmp_path / "same")
    same = tokenbench.run(config)["figures"]
    assert (same["lpips"], same["rfvd"]) == (0, pytest.approx(0, abs=1e-6))
