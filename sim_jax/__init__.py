"""SIM: search-based interest model over lifelong sequences (arXiv 2006.05639), with DCAF (arXiv 2006.09684)."""
