"""A trained model as a folder that the transformers library loads, and back.

``modeling_jepa_gpt.py`` and ``tokenization_jepa_gpt.py`` are copied into the folder; they import
nothing of this package, and nothing here imports them.
"""
