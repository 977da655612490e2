"""Training: the loop, its optimizer, validation and logging; tokenizer training."""
