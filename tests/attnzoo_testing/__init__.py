"""Tools of the tests: golden files, error measures, compiling for absent accelerators."""
