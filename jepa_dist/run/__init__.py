"""What a run is besides its tensors: progress, the owner of its directory, what all ranks share."""
