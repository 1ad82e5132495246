"""The transformer: transformers' Llama with exact RoPE, the two-softmax loss, its weights and its cost in FLOPs."""
