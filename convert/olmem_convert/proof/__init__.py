"""That a converted folder computes what the native model computes: native forward passes, and the comparison."""
