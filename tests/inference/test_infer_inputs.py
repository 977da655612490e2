"""What a run takes: tokens of both kinds of folder, folders of media, lists; what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import infer_case, onex
from helpers.infer_case import FRAMES, HEIGHT, TOKENIZER, WIDTH, random_config

from cosmos_posttrain import TokenDataset, load_tokenizer
from cosmos_posttrain.cli import parse
from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.errors import ConfigError, PartialFailureError, TokenizerError, UserError
from cosmos_posttrain.geometry import ClipGeometry
from cosmos_posttrain.inference.batch import open_run, run
from cosmos_posttrain.inference.config import FLAGS, InferConfig, validate
from cosmos_posttrain.prepare.onex.versions import OnexVersion
from cosmos_posttrain.prepare.prepare import prepare
from cosmos_posttrain.video import probe, read_clips

ONEX_TOKENIZER = "tiny-dv8x8x8"


def prepared(folder: Path, num_videos: int = 3) -> Path:
    """Tokens of some videos."""
    for number in range(num_videos):
        infer_case.write_input(folder / "videos" / f"{number}.mp4", fps=10.0 + number)
    from cosmos_posttrain.prepare.config import PrepareConfig

    config = PrepareConfig(
        input_videos_dir=str(folder / "videos"),
        output_prefix=str(folder / "tokens"),
        width=WIDTH,
        height=HEIGHT,
        num_context_frames=FRAMES,
        tokenizer_compression_factor="8,16,16",
        encoder_path=TOKENIZER,
    )
    prepare(config)
    return folder / "tokens"


def token_config(tokens: Path, out: Path, **changes: Any) -> InferConfig:
    values: dict[str, Any] = {
        "input_image_or_video_path": None,
        "input_tokens_dir": str(tokens),
        "height": None,
        "width": None,
        "num_context_frames": None,
    }
    return random_config(tokens, out, **{**values, **changes})


def small_onex(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A v2.0 set as 1X ships it, in small, of a tokenizer that is here; 5 windows of one scene."""
    tokenizer = load_tokenizer(ONEX_TOKENIZER)
    info = TokenizerInfo(ONEX_TOKENIZER, "", (8, 8, 8), tuple(tokenizer.levels), 1000)
    version = OnexVersion("2.0", info, ClipGeometry(17, 32, 48, tokenizer.compression), 17, 25)
    monkeypatch.setattr(onex, "SMALL", version)
    onex.use_small_version(monkeypatch)
    return onex.write_v2(folder, "val", ((51, 20, 34),), version=version)


def record_of(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def test_tokens_of_a_prepared_folder_and_all_that_can_be_written(tmp_path: Path) -> None:
    tokens, out = prepared(tmp_path), tmp_path / "out"
    config = token_config(
        tokens, out, save_tokens=True, save_log_probs=True, side_by_side=True, batch_size=2
    )
    run(config)
    clips = TokenDataset(tokens, "all")
    for number in range(3):
        stem = f"output_{number:05d}"
        found = np.load(out / f"{stem}.tokens.npy")
        assert found.shape == clips.latent_shape and found.dtype == np.int64
        assert np.array_equal(found[:2], clips[number].view(*clips.latent_shape)[:2])
        log_probs = np.load(out / f"{stem}.log_probs.npy")
        assert np.isnan(log_probs[:2]).all() and (log_probs[2] < 0).all()
        assert probe(out / f"{stem}.mp4").fps == 10.0 + number
        both = read_clips(out / f"{stem}.side_by_side.mp4", [0], FRAMES, HEIGHT, 2 * WIDTH)[0]
        tokenizer = load_tokenizer(TOKENIZER)
        truth = tokenizer.decode(clips[number].view(1, *clips.latent_shape).int())[0]
        truth = (truth + 1) * 127.5
        assert (both.frames[:, :, :, WIDTH:].float() - truth).abs().mean() < 6
        # The given frames are the same at both sides.
        halves = both.frames[:, :9].float().split(WIDTH, dim=3)
        assert (halves[0] - halves[1]).abs().mean() < 6
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(before) == 15
    # A file that is missing is made again, with the clip that it belongs to and no other.
    (out / "output_00001.log_probs.npy").unlink()
    run(config)
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {name.split(".")[0] for name in after if after[name] != before[name]} == {"output_00001"}
    assert len(after) == 15


def test_tokens_as_1x_ships_them_with_the_flags_of_the_old_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = small_onex(tmp_path / "val_v2.0", monkeypatch)
    path = tokens / "video_0.bin"
    values = np.fromfile(path, np.int32)
    values[2 * 3 * 24 + 5] = 1000  # in the third window
    values.tofile(path)
    command = (
        "--checkpoint_dir checkpoints --ar_model_dir random:tiny --input_type tokens "
        f"--input_tokens_dir {tokens}/ --top_p 0.8 --temperature 1.0 "
        "--video_save_name autoregressive-4b1-tokens"
    )
    monkeypatch.chdir(tmp_path)
    config = parse(InferConfig, FLAGS, shlex.split(command), "infer.py", "")
    with pytest.raises(PartialFailureError) as caught:
        run(dataclasses.replace(config, batch_size=4))
    # Of seven windows five show one scene; they are the clips.
    assert str(caught.value).startswith("1 of 5 inputs")
    assert "clip 2 of " in str(caught.value) and "token 1000" in str(caught.value)
    assert sorted(path.name for path in Path("outputs").glob("*.mp4")) == [
        f"autoregressive-4b1-tokens_0000{number}.mp4" for number in (0, 1, 3, 4)
    ]
    assert probe("outputs/autoregressive-4b1-tokens_00000.mp4").fps == 30.0
    with pytest.raises(ConfigError, match=r"--only_eval.*evaluate\.py onex"):
        validate(dataclasses.replace(config, only_eval=True))


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    tokens = prepared(tmp_path, 1)
    config = token_config(tokens, tmp_path / "out", encoder_path="tiny-dv8x8x8")
    with pytest.raises(UserError, match="8x16x16"):
        open_run(config)
    trained = infer_case.write_checkpoint(
        tmp_path / "trained", tokenizer=dataclasses.replace(infer_case.contract().tokenizer)
    )
    other = json.loads((tokens / "manifest.json").read_text())
    other["contract"]["tokenizer"]["sha256"] = "0" * 64
    config = token_config(tokens, tmp_path / "out", ar_model_dir=str(trained), encoder_path=None)
    open_run(config)
    (tokens / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(TokenizerError, match=r"other weights.*--allow_tokenizer_mismatch"):
        open_run(config)


def test_some_clips_of_many(tmp_path: Path) -> None:
    tokens = prepared(tmp_path)
    items = open_run(token_config(tokens, tmp_path / "out", max_clips=2))[1]
    assert [item.request.item for item in items] == [0, 1]
    items = open_run(token_config(tokens, tmp_path / "out", item=2))[1]
    assert [item.request.item for item in items] == [2]
    with pytest.raises(ConfigError, match="--item 3 is not in the list, which has 3 inputs"):
        open_run(token_config(tokens, tmp_path / "out", item=3))


def media(folder: Path) -> Path:
    """Two videos and an image, and a text beside them."""
    import skimage.io

    folder.mkdir()
    (folder / "below").mkdir()
    infer_case.write_input(folder / "a.mp4")
    infer_case.write_input(folder / "below" / "c.mp4")
    frame = infer_case.moving_bar(1)[:, 0].permute(1, 2, 0).numpy()
    skimage.io.imsave(folder / "b.png", frame, check_contrast=False)
    (folder / "notes.txt").write_text("no video")
    return folder


def test_a_folder_of_images_and_videos_in_batches(tmp_path: Path) -> None:
    folder, out = media(tmp_path / "media"), tmp_path / "media" / "out"
    config = random_config(
        folder, out, input_image_or_video_path=None, batch_input_path=str(folder), batch_size=2
    )
    run(dataclasses.replace(config, video_save_folder=str(tmp_path / "one"), batch_size=1))
    for _ in range(2):  # the second time, with its own outputs below the inputs
        run(config)
        assert sorted(path.name for path in out.glob("*.mp4")) == ["a.mp4", "b.mp4", "c.mp4"]
    assert record_of(out / "b.json")["num_condition_tokens"] == 6
    records = {name: record_of(out / f"{name}.json") for name in "abc"}
    assert [records[name]["settings"]["item"] for name in "abc"] == [0, 1, 2]
    # The same input in another place has other random numbers.
    assert records["a"]["tokens_sha256"] != records["c"]["tokens_sha256"]
    for name in "abc":
        alone = record_of(tmp_path / "one" / f"{name}.json")
        assert alone["tokens_sha256"] == records[name]["tokens_sha256"]


def test_samples_of_an_input_and_more_of_them_later(tmp_path: Path) -> None:
    video, out = infer_case.write_input(tmp_path / "bar.mp4"), tmp_path / "out"
    config = random_config(video, out)
    run(config)
    first = (out / "output.mp4").stat().st_mtime_ns
    run(dataclasses.replace(config, num_samples=3, batch_size=3))
    assert (out / "output.mp4").stat().st_mtime_ns == first
    names = ["output", "output_sample_1", "output_sample_2"]
    hashes = {record_of(out / f"{name}.json")["tokens_sha256"] for name in names}
    assert len(hashes) == 3


def test_a_record_has_the_command_that_makes_the_clip_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = media(tmp_path / "my media")
    jsonl = infer_case.write_jsonl(tmp_path / "list.jsonl", "my media/a.mp4", "my media/b.png")
    monkeypatch.chdir(tmp_path)
    config = random_config(
        folder,
        Path("out"),
        input_image_or_video_path=None,
        batch_input_path=str(jsonl),
        num_samples=2,
        seed=5,
        batch_size=2,
        save_tokens=True,
    )
    run(config)
    record = record_of(tmp_path / "out" / "b_sample_1.json")
    words = shlex.split(record["command"])
    assert words[:2] == ["python", "infer.py"]
    (tmp_path / "out" / "b_sample_1.mp4").unlink()
    monkeypatch.chdir("/")
    run(parse(InferConfig, FLAGS, words[2:], "infer.py", ""))
    again = record_of(tmp_path / "out" / "b_sample_1.json")
    assert again["command"] == record["command"]
    assert again["settings"] == record["settings"]
    assert again["tokens_sha256"] == record["tokens_sha256"]
    assert set(record["peak_bytes"]) == {"encode", "generate", "decode"}


def test_paths_of_a_list_are_relative_to_it_or_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media(tmp_path / "media")
    (tmp_path / "lists").mkdir()
    jsonl = infer_case.write_jsonl(
        tmp_path / "lists" / "list.jsonl", "../media/a.mp4", "media/b.png"
    )
    config = random_config(
        tmp_path, tmp_path / "out", input_image_or_video_path=None, batch_input_path=str(jsonl)
    )
    with pytest.raises(ConfigError, match=r"line 2: media/b.png is not a file.*or to the folder"):
        open_run(config)
    monkeypatch.chdir(tmp_path)
    items = open_run(config)[1]
    assert [item.video.name for item in items] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpus": 2}, "--num_gpus 2 needs 2 processes, but 1 was started; start with torchrun"),
        ({"num_gpus": 1, "tensor_model_parallel_size": 2}, "both say how many processes"),
        ({"input_type": "tokens"}, "give --input_tokens_dir"),
        ({"input_tokens_dir": "d"}, "give one of"),
        ({"input_tokens_dir": "d", "input_image_or_video_path": None, "input_type": "video"}, "of"),
        ({"max_clips": 3}, "--max_clips goes with --input_tokens_dir"),
        ({"num_samples": 2, "temperature": 0.0}, "would all be the same"),
        ({"num_samples": 2, "sample": 1}, "give one of the two"),
        ({"rollout_overlap": 2}, "goes with --num_rollout_chunks above 1"),
        ({"num_rollout_chunks": 0}, "--num_rollout_chunks 0 must be at least 1"),
        ({"batch_size": 0}, "--batch_size 0 must be at least 1"),
        ({"temperature": -1.0}, "--temperature -1.0 must be at least 0"),
        ({"top_p": 0.0}, "--top_p 0.0 must be above 0"),
        ({"top_p": 1.5}, "--top_p 1.5 must be at most 1"),
        ({"input_type": "image", "side_by_side": True}, "--side_by_side needs a truth"),
    ],
)
def test_settings_that_contradict_one_another(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(random_config(Path("a.mp4"), Path("out"), **changes))


def test_inputs_that_nothing_can_be_made_of(tmp_path: Path) -> None:
    import skimage.io

    skimage.io.imsave(tmp_path / "dot.png", np.zeros((1, 2, 3), np.uint8), check_contrast=False)
    infer_case.write_input(tmp_path / "still.mp4", 1)
    (tmp_path / "text.mp4").write_text("this is no video\n")
    infer_case.write_input(tmp_path / "good.mp4")
    names = ["dot.png", "still.mp4", "text.mp4", "good.mp4"]
    jsonl = infer_case.write_jsonl(tmp_path / "list.jsonl", *names)
    out = tmp_path / "out"
    config = random_config(
        tmp_path, out, input_image_or_video_path=None, batch_input_path=str(jsonl), batch_size=4
    )
    with pytest.raises(PartialFailureError) as caught:
        run(config)
    text = str(caught.value)
    assert text.startswith("3 of 4 inputs")
    assert "dot.png has 2x1 pixels, too few for a clip of 48x32; give at least 3x2" in text
    assert "still.mp4 has 1 frame and 9 are to be given" in text
    assert "text.mp4 holds text, not video" in text
    assert [path.name for path in out.glob("*.mp4")] == ["good.mp4"]
    for name in names[:3]:
        with pytest.raises(UserError, match=name) as alone:
            run(random_config(tmp_path / name, tmp_path / "single"))
        assert alone.value.exit_code == 2
    assert not list((tmp_path / "single").glob("*.mp4"))


def test_a_gpu_count_is_the_tensor_parallel_size(tmp_path: Path) -> None:
    video = infer_case.write_input(tmp_path / "bar.mp4")
    session, _ = open_run(random_config(video, tmp_path / "out", num_gpus=1))
    assert session.tensor_model_parallel_size == 1
    assert torch.distributed.is_available()
