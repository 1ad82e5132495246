"""The transformer: transformers' Llama with exact RoPE, the loss by modality, its weights and its cost in FLOPs."""
