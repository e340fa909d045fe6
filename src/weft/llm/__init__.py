"""What is peculiar to language models and to transformers: their classes, tokenizers, layers and checks."""
