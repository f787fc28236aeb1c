"""The optimizer room: parameter groups, schedules, AdamW and Muon on parameter shards, EMA."""
