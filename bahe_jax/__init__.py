"""BAHE: behaviour aggregated hierarchical encoding (arXiv 2403.19347)."""
