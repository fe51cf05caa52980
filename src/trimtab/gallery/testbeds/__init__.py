"""Test beds: small data with known ground truth, micro models made from it, and real models.

text         public-domain English and made-up stories whose sentiment and topic are known
micro        the micro checkpoints that ship with the package, and the recipes that make them
preferences  answers whose reward is known, and noisy preferences between them
drift        students whose answers drift into junk, for on-policy distillation
real_models  Gemma 3 270M, MiniLM-L6 and real text, made once from packages, in a cache
reviews      preference pairs and prompts from film reviews whose sentiment people have rated
"""
