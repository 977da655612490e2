"""A training run and its evaluations as one page: see ``command.py``."""
