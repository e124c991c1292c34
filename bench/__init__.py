"""Benchmarks of attn_ext against torch: check, then time, and print ratios (`python -m bench`)."""
