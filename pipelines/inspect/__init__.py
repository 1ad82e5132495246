"""What a run has made: what a folder holds, whether every byte is as committed, and where its tokens come from."""
