"""The store's side: one dump to one object, whole, proven, never overwriting another."""
