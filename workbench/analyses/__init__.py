"""Analyses: recorded runs or a model in, one `Result` out. One file a family; each has its default figure beside it."""
