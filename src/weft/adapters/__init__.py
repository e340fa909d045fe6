"""Adapters as models of their own: read, written, extracted, resized, inspected and merged by their factors."""
