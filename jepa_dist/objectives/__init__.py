"""Auxiliary objectives on hidden states, separate from the model; see ``jepa.objective``."""
