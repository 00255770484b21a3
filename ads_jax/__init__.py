"""ADS: adaptive domain scaling (arXiv 2502.05523)."""
