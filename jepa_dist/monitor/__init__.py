"""What a run tells its users: metrics.jsonl, TensorBoard, the console. Plain numbers only."""
