"""The vqgan stage: the visual tokenizer's weights, imported from where the recipe says or trained on its frames."""

from pipelines.codecs.stage import vqgan_task

__all__ = ["vqgan_task"]
