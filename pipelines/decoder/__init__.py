"""Decoding of raw media in a process of its own, since a medium may be broken or hostile and FFmpeg and Pillow are not.

client.py is the door: what a medium's bytes are, in; frames, out. process.py runs the decoder, child.py is what runs in
it, under the limits of limits.py; messages.py is what goes over the pipes between them.
"""
