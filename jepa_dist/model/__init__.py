"""The GPT as plain modules, without knowledge of ranks, sharding or compilation."""
