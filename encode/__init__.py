"""Images -> files of visual tokens, and figures of them."""
