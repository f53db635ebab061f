"""Images -> files of visual tokens."""
