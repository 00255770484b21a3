"""The steps that experiments put together: a problem from a dataset, pre-training, asking, ranking, scaling."""
