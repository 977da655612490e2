"""1X's data: every window comes in and goes out again as it was; only whole ones are served."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR, kill_tree, run_distributed, run_script
from helpers.onex import SEGMENTS, write_v1, write_v2
from helpers.prepared import contents

from cosmos_posttrain.data import Manifest, TokenDataset
from cosmos_posttrain.errors import (
    ConfigError,
    DatasetError,
    OutputFolderError,
    TokenizerError,
)
from cosmos_posttrain.prepare.config import PrepareConfig
from cosmos_posttrain.prepare.onex import importing
from cosmos_posttrain.prepare.onex.exporting import export_onex
from cosmos_posttrain.prepare.prepare import prepare


def import_to(source: Path, output: Path, **changes: object) -> Manifest:
    return prepare(
        PrepareConfig(input_tokens_dir=str(source), output_prefix=str(output), **changes)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("form", ["train", "val"])
def test_v2_comes_in_and_goes_out_byte_for_byte(form, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "WINDOWS_PER_SHARD", 4)  # shards of 1X's do not fill ours
    source = write_v2(tmp_path / "in", form)
    manifest = import_to(source, tmp_path / "out")
    assert manifest.contract.latent_shape == (3, 32, 32) and manifest.contract.dtype == "uint16"
    assert manifest.contract.tokenizer.compression == (8, 8, 8)
    assert [shard.num_documents for shard in manifest.shards] == [4, 3, 3]
    # Of the 105 frames of shard 0, frame 71 is within a window, and three are left; of the 40 of
    # shard 1, six are left.
    assert manifest.num_documents == 10 and manifest.num_unserved == 3
    export_onex(tmp_path / "out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)


def test_served_windows_lie_in_one_segment_and_have_their_states(tmp_path):
    source = write_v2(tmp_path / "in")
    import_to(source, tmp_path / "out")
    tokens = [np.fromfile(source / f"videos/video_{n}.bin", np.int32) for n in range(2)]
    states = [np.fromfile(source / f"robot_states/states_{n}.bin", np.float32) for n in range(2)]
    segments = [np.repeat(np.arange(len(part)) + 7, part) for part in SEGMENTS]
    whole = TokenDataset(tmp_path / "out", "all")
    seen = []
    for index in range(len(whole)):
        row = whole.row(index)
        shard, first = int(row.source.split()[1]), row.first_frame
        assert set(segments[shard][first : first + 17]) == {int(row.source.split()[3])}
        window = tokens[shard].reshape(-1, 3072)[first // 17]
        assert (whole[index].numpy() == window).all()
        expected = states[shard].reshape(-1, 25)[first : first + 17]
        found = whole.states(index)
        assert found is not None and found.shape == (17, 25)
        assert (found.numpy().view(np.uint32) == expected.view(np.uint32)).all()
        seen.append((shard, first // 17))
    full = [
        (shard, window)
        for shard, ids in enumerate(segments)
        for window in range(len(ids) // 17)
        if len(set(ids[window * 17 : window * 17 + 17])) == 1
    ]
    assert seen == full and len(full) == 7
    splits = [TokenDataset(tmp_path / "out", name, "2,1,1") for name in ("train", "validation")]
    splits.append(splits[0].other_split("test"))
    assert sorted(i for data in splits for i in data.indices) == whole.indices.tolist()
    sources = [{data.source(i) for i in range(len(data))} for data in splits]
    assert len(set.union(*sources)) == sum(map(len, sources))
    # The sidecars say the same as the one file of all sources.
    (tmp_path / "out/sources.npz").unlink()
    assert TokenDataset(tmp_path / "out", "all").indices.tolist() == whole.indices.tolist()


def test_v1_comes_in_and_goes_out_byte_for_byte(tmp_path):
    source = write_v1(tmp_path / "in")
    manifest = import_to(source, tmp_path / "out")
    assert manifest.contract.latent_shape == (16, 16, 16)
    assert manifest.num_documents == 4 and manifest.num_unserved == 2  # one crosses, one is a tail
    frames = np.fromfile(source / "video.bin", np.uint32).reshape(-1, 256)
    data = TokenDataset(tmp_path / "out", "all")
    assert torch.equal(data[1], torch.from_numpy(frames[16:32].astype(np.int64).ravel()))
    joints = np.fromfile(source / "actions/joint_pos.bin", np.float32).reshape(-1, 21)
    states = data.states(1)
    assert states is not None and (states[:, 2:23].numpy() == joints[16:32]).all()
    export_onex(tmp_path / "out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)


def test_a_shard_without_frames_and_a_set_of_tails_are_stored(tmp_path):
    source = write_v2(tmp_path / "in", segments=((), (9,), (5, 12)))
    manifest = import_to(source, tmp_path / "out")
    assert manifest.num_documents == manifest.num_unserved == 2
    export_onex(tmp_path / "out", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)
    with pytest.raises(DatasetError, match="no clip to use"):
        TokenDataset(tmp_path / "out")


def break_file(folder: Path, name: str, change: object) -> None:
    path = folder / name
    if change is None:
        path.unlink()
    elif isinstance(change, int):
        os.truncate(path, path.stat().st_size + change)
    else:
        path.write_text(str(change))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("videos/video_1.bin", -4, "has 36860 bytes, expected 36864: (3, 3, 32, 32) of int32"),
        ("videos/video_1.bin", 12288, "has 49152 bytes, expected 36864"),
        ("segment_indices/segment_idx_0.bin", -1, "has 419 bytes, expected 420"),
        ("robot_states/states_1.bin", 100, "has 4100 bytes, expected 4000: (40, 25) of float32"),
        ("robot_states/states_0.bin", None, "states_0.bin is missing"),
        ("metadata.json", None, "metadata.json is missing"),
        ("metadata/metadata_1.json", None, "metadata_1.json is missing"),
        ("metadata/metadata_1.json", "{", "it is not JSON"),
        ("metadata/metadata_1.json", '{"shard_num_frames": "40"}', "shard_num_frames is '40'"),
        ("metadata.json", '{"num_shards": 0, "hz": 30}', "num_shards is 0"),
        ("metadata.json", '{"num_images": 9, "hz": 30}', "neither v2.0's num_shards nor"),
    ],
)
def test_what_does_not_fit_is_refused_with_file_and_sizes(name, change, sentence, tmp_path):
    source = write_v2(tmp_path / "in")
    break_file(source, name, change)
    with pytest.raises(DatasetError) as caught:
        import_to(source, tmp_path / "out")
    assert sentence in str(caught.value) and str(source / name) in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("video.bin", -4, "has 50172 bytes, expected 50176: (49, 16, 16) of uint32"),
        ("segment_ids.bin", 4, "has 200 bytes, expected 196"),
        ("actions/joint_pos.bin", -4, "expected a multiple of 196"),
        ("metadata.json", '{"num_images": 49, "hz": 30, "s": 20, "vocab_size": 1000}', "s 20"),
    ],
)
def test_a_v1_file_of_another_size_is_refused(name, change, sentence, tmp_path):
    source = write_v1(tmp_path / "in")
    break_file(source, name, change)
    with pytest.raises(DatasetError) as caught:
        import_to(source, tmp_path / "out")
    assert sentence in str(caught.value) and str(source / name) in str(caught.value)


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    source = write_v2(tmp_path / "in", "val")
    tokens = np.fromfile(source / "video_1.bin", np.int32)
    tokens[4000] = 64000
    tokens.tofile(source / "video_1.bin")
    with pytest.raises(DatasetError, match=r"video_1\.bin holds token 64000 at number 4000"):
        import_to(source, tmp_path / "out")


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.prepare.config import PrepareConfig
from cosmos_posttrain.prepare.onex import folder, importing
from cosmos_posttrain.prepare.prepare import prepare

importing.WINDOWS_PER_SHARD = 4
read, calls = folder.OnexFolder.tokens, []

def slow(*args):
    calls.append(args)
    while len(calls) == 2:
        time.sleep(1)
    return read(*args)

folder.OnexFolder.tokens = slow
run_cli(lambda: prepare(PrepareConfig(input_tokens_dir=sys.argv[1], output_prefix=sys.argv[2])))
"""


@pytest.mark.slow
def test_a_killed_import_goes_on(tmp_path, monkeypatch, capsys):
    source, output = write_v2(tmp_path / "in"), tmp_path / "out"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(REPOSITORY_DIR / "tests")))
    command = [sys.executable, str(script), str(source), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY_DIR)}
    with subprocess.Popen(command, env=environment) as process:
        try:
            deadline = time.monotonic() + 300
            while not (output / "shard-00000.json").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            with pytest.raises(OutputFolderError, match="written by another process"):
                import_to(source, output)
            process.send_signal(signal.SIGKILL)
            process.wait()
        finally:
            kill_tree(process.pid)
    with pytest.raises(OutputFolderError, match="another data set"):
        import_to(source, output)  # of other shards
    monkeypatch.setattr(importing, "WINDOWS_PER_SHARD", 4)
    before = (output / "shard-00000.bin").stat().st_mtime_ns
    import_to(source, output)
    assert "1 shards are done" in capsys.readouterr().out
    assert (output / "shard-00000.bin").stat().st_mtime_ns == before
    import_to(source, tmp_path / "whole")
    assert contents(output) == contents(tmp_path / "whole")
    import_to(source, output)
    assert "complete already: 10 windows" in capsys.readouterr().out


def _import(source: Path, output: Path) -> int:
    importing.WINDOWS_PER_SHARD = 2
    return import_to(source, output).num_documents


@pytest.mark.distributed
def test_two_processes_import_the_same(tmp_path, monkeypatch):
    source = write_v2(tmp_path / "in")
    assert run_distributed(_import, 2, source, tmp_path / "two") == [10, 10]
    monkeypatch.setattr(importing, "WINDOWS_PER_SHARD", 2)
    import_to(source, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_memory_does_not_grow_with_the_set(tmp_path):
    """A set of 75 MB is imported in far less on top of the process: shards are forgotten."""
    import psutil

    source = write_v2(tmp_path / "in", "val", segments=((17 * 6000,),))
    import_to(write_v2(tmp_path / "small", "val", segments=((17 * 3000,),)), tmp_path / "warm")
    before = psutil.Process().memory_info().rss
    assert import_to(source, tmp_path / "out").num_documents == 6000
    assert psutil.Process().memory_info().rss - before < 30e6


def test_export_refuses_what_is_no_import_and_notices_damage(tmp_path):
    source = write_v2(tmp_path / "in", "val")
    import_to(source, tmp_path / "out")
    with pytest.raises(OutputFolderError, match="is not empty"):
        export_onex(tmp_path / "out", source)
    plain = shutil.copytree(tmp_path / "out", tmp_path / "plain")
    manifest = json.loads((plain / "manifest.json").read_text())
    del manifest["plan"]["imported_from"]
    (plain / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="was not imported from 1X"):
        export_onex(plain, tmp_path / "no")
    states = tmp_path / "out" / "shard-00000.states"
    states.write_bytes(states.read_bytes()[:-1] + b"x")
    with pytest.raises(DatasetError, match="sha256 is not the manifest's"):
        export_onex(tmp_path / "out", tmp_path / "no")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "plain"]


def test_settings_of_clips_and_other_tokenizers_are_refused(tmp_path):
    source = write_v2(tmp_path / "in", "val")
    with pytest.raises(ConfigError, match="--width, --seed have no effect on --input_tokens_dir"):
        import_to(source, tmp_path / "out", width=256, seed=3)
    with pytest.raises(ConfigError, match="give one of"):
        import_to(source, tmp_path / "out", input_jsonl="a.jsonl")
    with pytest.raises(TokenizerError, match=r"but 1X v2\.0 was made by"):
        import_to(source, tmp_path / "out", encoder_path="tiny-dv8x8x8")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_commands_a_user_calls(tmp_path):
    source, output = write_v2(tmp_path / "in"), tmp_path / "out"
    flags = ["--input_tokens_dir", source, "--output_prefix", output]
    finished = run_script(["prepare_dataset.py", *flags])
    assert finished.returncode == 0 and "imported 10 windows of 1X v2.0" in finished.stdout
    data = ["-m", "cosmos_posttrain.data"]
    assert run_script([*data, "verify", "--data_path", output]).returncode == 0
    finished = run_script([*data, "info", "--data_path", output])
    assert "3 of them in no split" in finished.stdout
    finished = run_script([*data, "export", "--data_path", output, "--output_dir", tmp_path / "b"])
    assert finished.returncode == 0 and contents(tmp_path / "b") == contents(source)
    break_file(source, "videos/video_0.bin", -4)
    finished = run_script(["prepare_dataset.py", *flags[:3], tmp_path / "c"])
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
