"""Timing of the kernels beside their peers, in one interleaved run (``tools/bench.py``)."""
