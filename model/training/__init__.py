"""The training engine: DeepSpeed ZeRO over a mesh of data-parallel and sequence-parallel ranks."""
