"""Parsing of raw media, tables and tars in separate processes, since they may be broken or hostile and crash libraries.

client.py is the door: where bytes are, in; frames, records or samples, out. It starts the processes in which child.py
runs, for media or for tables, under the limits of limits.py and the confinement of sandbox.py. messages.py is what goes
between them, content.py the bytes that they read.
"""
