"""Other libraries on the kernels of this package. Nothing here is imported by `attn_ext` itself."""
