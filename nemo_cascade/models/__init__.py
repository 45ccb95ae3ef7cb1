"""NemotronH on Megatron-core, its NeMo subclass, and the way to and from Hugging Face folders.

Importing this package costs nothing: `config` and `hf_folder` need no torch, the rest is imported where it is used.
"""
