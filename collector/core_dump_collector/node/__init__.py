"""The disk's side: the watch directory, the files in it, and what the node says about them."""
