"""The OpenAI-compatible server: that of transformers, with SAIL-VL registered and checks of requests before it."""
