"""Token shards, the order they are read in, and everything that prepares or checks them."""
