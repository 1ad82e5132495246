"""Fused kernels for what a decoder layer does position by position: RMSNorm, rotary embedding, SwiGLU."""
