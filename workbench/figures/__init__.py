"""Default figures: a Result in, a matplotlib Figure out; one file a family of analyses."""
