"""Do it: bytes in, a layout out."""
