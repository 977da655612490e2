"""Evaluation: pictures of what a model sees and makes, and of how it learned."""
