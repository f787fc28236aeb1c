"""Monitoring of a run: metrics.jsonl, TensorBoard, console, watchdog; handles plain numbers."""
