"""Training of video tokenizers.

Flows in: videos and photographs, and a config. Flows out: a native tokenizer folder
(``config.json`` + ``model.safetensors``). Start reading at :func:`trainer.train`.
"""
