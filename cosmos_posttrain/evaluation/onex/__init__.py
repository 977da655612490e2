"""``evaluate.py onex``: a model on windows of the 1X World Model Challenge (docs/evaluation.md)."""
