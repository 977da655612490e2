"""Names of the tokenizers that the package ships. No torch."""

# By compression (T, H, W); ``tiny`` picks among them.
SHIPPED = {
    (4, 8, 8): "tiny-dv4x8x8",
    (8, 8, 8): "tiny-dv8x8x8",
    (8, 16, 16): "tiny-dv8x16x16",
}
