"""Prefill, drafting, verification and the decoding loop."""
