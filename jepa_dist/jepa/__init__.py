"""The JEPA objective: spans, and the loss on the hidden states at their ends."""
