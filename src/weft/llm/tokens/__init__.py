"""Vocabularies: reading tokenizers as data, bringing models to one vocabulary, transplanting, chat templates."""
