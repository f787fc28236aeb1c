"""Token shards: the order of reading, preparation and checks."""
