"""Auxiliary objectives on hidden states, beside the model: ``jepa.objective`` chooses one."""
