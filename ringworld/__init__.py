"""Ringworld for Python users: a trained model in three lines.

    import ringworld
    model = ringworld.load("DIR")             # of `ringworld export` or `ringworld import-lwm`, at any fsspec URL
    model.video("a ship at sea", frames=16).save("ship.mp4")

`model.generate` continues text, `model.images` and `model.video` draw frames, and `ringworld.Conversation(model).say`
talks about pictures and films.
"""

from __future__ import annotations

from pipelines.inference.chat import Conversation
from pipelines.inference.loaded import LoadedModel, load
from pipelines.inference.media import Film

__all__ = ["Conversation", "Film", "LoadedModel", "load"]
