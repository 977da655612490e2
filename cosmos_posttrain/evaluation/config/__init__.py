"""Settings, flags and checks of ``evaluate.py``: one file for each command. No torch.

Flows in: the command line. Flows out: a config, field by field as it was given.
"""
