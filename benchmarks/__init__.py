"""Trimtab beside its peers: ratios measured in one run. `python -m benchmarks [names]`, or one script alone."""
