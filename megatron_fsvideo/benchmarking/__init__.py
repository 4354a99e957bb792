"""Parts that the benchmark scripts share: contenders in turn, the peak of memory."""
