"""Decoding of raw media in a separate process, since media may be broken or hostile and may crash FFmpeg and Pillow.

client.py is the door: where a medium's bytes are, in; frames, out. It starts the process in which child.py runs, under
the limits of limits.py; messages.py is what goes over the pipes between them.
"""
