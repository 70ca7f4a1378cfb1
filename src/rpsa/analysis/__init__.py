"""The experiments of sections 4.1 and 4.4 that read a Fisher: where it lies, and what happens where it is high."""
