"""VGG-19 features: torchvision's names and architecture, and the term made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tokenizer_training_case import read_rows, small_config
from safetensors.torch import save_file
from torch import Tensor, nn

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.tokenizer_training.config import LossConfig
from cosmos_posttrain.tokenizer_training.perceptual import VGG19, PerceptualLoss, load_vgg
from cosmos_posttrain.tokenizer_training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the published one: ``features.*``, and the classifier that is not needed."""
    torch.manual_seed(0)
    network = VGG19()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # keeps activations alive through 16 layers
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    tensors = {name: t.half() for name, t in network.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(tensors | {"classifier.6.bias": torch.zeros(1000)}, path)
    return path


def sequential_features(tensors: dict[str, Tensor], frames: Tensor) -> list[Tensor]:
    """Configuration E written out as one list of layers, as the published names count them."""
    widths = [64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = width
    network = nn.Sequential(*layers)
    network.load_state_dict(
        {n.removeprefix("features."): t for n, t in tensors.items() if n.startswith("features.")}
    )
    found, x = [], ((frames + 1) / 2 - mean) / std
    for number, layer in enumerate(network):
        x = layer(x)
        if number in (3, 8, 17, 26, 35):  # relu1_2, relu2_2, relu3_4, relu4_4, relu5_4
            found.append(x)
    return found


def test_features_are_those_of_configuration_e_after_the_last_relu_of_each_block(
    weights: Path,
) -> None:
    frames = torch.rand(2, 3, 32, 48) * 2 - 1
    tensors = torch.load(weights, weights_only=True)
    with torch.no_grad():
        expected = sequential_features(tensors, frames)
        found = load_vgg(weights)(frames)
    assert [f.shape[1] for f in found] == [64, 128, 256, 512, 512]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.std() > 0.01


def test_term_does_not_depend_on_the_sub_batches_and_has_gradients(weights: Path) -> None:
    torch.manual_seed(0)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    fake = (video + 0.3 * torch.randn(video.shape)).requires_grad_()
    results = []
    for max_frames in (2, 16):
        loss = PerceptualLoss(weights, CPU, max_frames)
        assert loss(video, video) == 0
        term = loss(fake, video)
        results.append((term.detach(), torch.autograd.grad(term, fake)[0]))
        assert all(not p.requires_grad for p in loss.network.parameters())
    with torch.no_grad():
        pairs = [load_vgg(weights)(v.transpose(1, 2).flatten(0, 1)) for v in (fake, video)]
        expected = sum((a - b).abs().mean() for a, b in zip(*pairs, strict=True))
    torch.testing.assert_close(results[0][0], expected)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)
    assert results[0][1].abs().sum() > 0


def test_training_with_the_term_logs_it(videos: Path, weights: Path, tmp_path: Path) -> None:
    loss = LossConfig(perceptual=0.1, vgg_weights=str(weights), vgg_frames=4)
    config = small_config(videos, tmp_path, max_steps=1, loss=loss, num_validation_clips=1)
    config.data.crop_sizes = [[16, 16]]
    train(config)
    (row,) = read_rows(tmp_path)
    assert row["loss_perceptual"] > 0
    config.loss, config.output_dir = LossConfig(), str(tmp_path / "plain")
    train(config)
    (plain,) = read_rows(tmp_path / "plain")
    assert row["loss"] == pytest.approx(plain["loss"] + 0.1 * row["loss_perceptual"], rel=1e-5)
    assert "loss_perceptual" not in plain


@pytest.mark.parametrize("kind", ["none", "absent", "corrupt", "wrong names", "not tensors"])
def test_unusable_weights_are_refused_in_one_sentence_and_nothing_is_written(
    kind: str, videos: Path, tmp_path: Path
) -> None:
    path: Path | None = tmp_path / "vgg.pth"
    message = "readable weights file"
    if kind == "none":
        path, message = None, r"download\.pytorch\.org.*loss\.gradient stands in"
    elif kind == "absent":
        message = "does not exist; download https"
    elif kind == "corrupt":
        path.write_bytes(b"not a zip file")
    elif kind == "wrong names":
        path = tmp_path / "vgg.safetensors"
        save_file({"conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
        message = r"is not VGG-19: features\.0\.weight"
    else:
        torch.save([1, 2], path)
        message = "does not hold tensors"
    loss = LossConfig(perceptual=0.1, vgg_weights=path and str(path))
    with pytest.raises(ConfigError, match=message) as error:
        train(small_config(videos, tmp_path / "run", loss=loss))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
