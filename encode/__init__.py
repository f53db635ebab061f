"""Images in, visual tokens out: streamed over folders, written, and drawn."""
