"""The 1X World Model Challenge's data: read as 1X ships it, imported, and written back.

Flows in: a folder as 1X ships it (v2.0, v1.1), or one that was imported from it. Flows out: windows
of tokens with their segments (``windows.py``), a prepared folder (``importing.py``), or 1X's own
files again, byte for byte (``exporting.py``).
"""
