"""``--compile``: the same curve, exact when resumed, and a sentence where nothing can compile."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.distributed_run import run_distributed, run_script
from helpers.run_case import losses, make_config, run
from torch._inductor import cpp_builder, exc

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models import compiling


@pytest.mark.slow
def test_a_compiler_that_cannot_compile(tokens: Path, tmp_path: Path) -> None:
    """As where Python's headers are missing."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n'
        "echo fatal error: Python.h: No such file or directory >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    words = ["train_general.py", "--data_path", str(tokens), "--model_path", "random:tiny"]
    words += ["--tensor_model_parallel_size", "1", "--split_string", "3,1,1", "--compile"]
    words += ["--log_dir", str(tmp_path / "run"), "--global_batch_size", "4"]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(compiler)}
    finished = run_script(words, env=caches)
    assert finished.returncode == 2, finished.stderr
    line = finished.stderr.strip().splitlines()[-1]
    assert line.startswith("error: --compile needs a C++ compiler (g++) with Python's headers")
    assert "Python.h" in line


def test_without_a_compiler(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> str:
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*leave --compile out"):
        run(make_config(tokens, tmp_path / "run", model__compile=True))
    assert not list(tmp_path.glob("run/**/*.jsonl"))
    run(make_config(tokens, tmp_path / "run", max_steps=1))


@pytest.mark.slow
def test_same_curve_when_compiled(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    run(make_config(tokens, plain, max_steps=10))
    compiled = tmp_path / "compiled"
    run(make_config(tokens, compiled, max_steps=10, model__compile=True))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    # Else nothing was compiled.
    assert losses(compiled) != losses(plain)
    recomputed = tmp_path / "recomputed"
    settings = {"model__compile": True, "model__recompute": True, "max_steps": 10}
    run(make_config(tokens, recomputed, **settings))
    assert losses(recomputed) == pytest.approx(losses(plain), rel=1e-5)
    assert compiling.is_on()
    run(make_config(tokens, tmp_path / "next", max_steps=1))
    assert not compiling.is_on()


@pytest.mark.slow
@pytest.mark.distributed
def test_compiled_run_is_resumed_exactly(tokens: Path, tmp_path: Path) -> None:
    """At TP 2, where the sequence's parts are norms' inputs."""
    settings = {
        "model__compile": True,
        "parallel__tensor_model_parallel_size": 2,
        "parallel__sequence_parallel": True,
        "save_every_n_steps": 5,
    }
    whole = make_config(tokens, tmp_path / "whole", max_steps=10, **settings)
    run_distributed(run, 2, whole)
    parts = tmp_path / "parts"
    run_distributed(run, 2, make_config(tokens, parts, max_steps=10, **settings))
    newest = next((parts / "default" / "checkpoints").glob("*step=9"))
    newest.rename(newest.with_name(f".tmp-0-{newest.name}"))
    run_distributed(run, 2, make_config(tokens, parts, max_steps=10, **settings))
    assert losses(parts) == losses(tmp_path / "whole")
    assert len(losses(parts)) == 10
