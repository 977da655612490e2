"""Lists of videos: sorted, each file once, whatever links there are."""

from __future__ import annotations

import pytest

from cosmos_posttrain.errors import UserError
from cosmos_posttrain.video import list_videos


def test_list_videos_is_sorted_recursive_and_skips_hidden_files(tmp_path):
    for name in ["b/2.MP4", "b.mp4", "a/1.webm", ".hidden.mp4", ".git/3.mp4", "a/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in list_videos(tmp_path)]
    assert found == ["a/1.webm", "b.mp4", "b/2.MP4"]
    with pytest.raises(UserError, match="does not exist"):
        list_videos(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no video"):
        list_videos(tmp_path / "none")
