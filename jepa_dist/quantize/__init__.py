"""The quantized artifact: a trained model as one small file (GPTQ, float16 scales, brotli)."""
