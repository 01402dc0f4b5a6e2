"""Who is asked: a model of transformers, a GGUF file in llama.cpp, an OpenAI-compatible endpoint."""
