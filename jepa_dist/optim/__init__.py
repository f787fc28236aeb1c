"""The optimizer: parameter groups, schedules, AdamW and Muon on parameter shards, EMA."""
