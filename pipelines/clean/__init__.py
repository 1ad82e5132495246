"""What no recipe of a run needs any more, and its removal: old outputs of stages, partitions' files, codes."""
