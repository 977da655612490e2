"""Which text encoders there are by name, and in what they compute. No torch."""

# What the published Video2World models were trained with, at the commit that other projects which
# run these models pin too.
DEFAULT_TEXT_ENCODER = "google-t5/t5-11b@90f37703b3334dfe9d2b009bfcbfbf1ac9d28ea3"
# In this package; random weights.
SHIPPED = ("tiny",)
# Not float16, in which T5's activations overflow.
TEXT_ENCODER_DTYPES = ("bfloat16", "float32")
