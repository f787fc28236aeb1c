"""Checks of the GPU path on a machine without a GPU.

``python -m tests.without_gpu --help`` lists the commands; docs/performance.md explains them. A CUDA
build of PyTorch, in an environment of its own (``environment``), compiles every region of the
shipped configurations for sm_90 (``regions``) and runs the trainer's step on tensors without data
(``step``); ``pretend`` makes both possible. ``table`` compares kernels and bytes with
``expected.json`` and predicts times.
"""
