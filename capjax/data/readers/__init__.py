"""Readers of the layouts that image-text data is published in; each opens a `Source`."""
