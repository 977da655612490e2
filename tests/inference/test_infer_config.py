"""The settings of ``infer.py``: every one has a flag and a help text, and its rule always binds."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
from helpers.distributed_run import run_script

from cosmos_posttrain.cli import parse
from cosmos_posttrain.config import documentation
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.inference.config import FLAGS, InferConfig, SessionConfig, validate


def test_every_setting_has_a_flag_and_a_help_text() -> None:
    names = {field.name for field in dataclasses.fields(InferConfig)}
    assert {flag.target for flag in FLAGS} == names
    assert documentation(InferConfig).keys() == names
    assert documentation(SessionConfig).keys() < names
    start = time.monotonic()
    finished = run_script(["infer.py", "--help"])
    # Without torch it takes 0.4 s; torch and megatron take 3 s and more.
    assert time.monotonic() - start < 2.0
    assert finished.returncode == 0
    assert "--input_prompts_path" in finished.stdout
    assert "processes that share the model" in finished.stdout


def test_rules_bind_values_of_a_file_and_of_overrides_and_all_are_named(tmp_path: Path) -> None:
    path = tmp_path / "infer.yaml"
    path.write_text("input_image_or_video_path: a.mp4\ntop_p: 1.5\nseed: 3\ntemperature: 0\n")
    config = parse(InferConfig, FLAGS, ["--config", str(path), "top_p=0.5"], "infer.py", "")
    validate(config)
    assert (config.top_p, config.seed, config.temperature) == (0.5, 3, 0.0)
    arguments = ["--config", str(path), "--width", "0", "layer_spec=x", "dtype=bf16"]
    config = parse(InferConfig, FLAGS, arguments, "infer.py", "")
    with pytest.raises(ConfigError) as caught:
        validate(config)
    for words in (
        "--top_p 1.5 must be at most 1",
        "--width 0 must be at least 1",
        "--layer_spec x is not one of torch, te",
        "--dtype bf16 is not one of",
    ):
        assert words in str(caught.value)
