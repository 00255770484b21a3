"""Ranking models: click probability from user, target, behaviours and context. One module each, one contract."""
