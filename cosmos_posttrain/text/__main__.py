"""``python -m cosmos_posttrain.text``: see ``convert``."""

from __future__ import annotations

from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.text.convert import main

if __name__ == "__main__":
    run_cli(main)
