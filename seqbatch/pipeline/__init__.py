"""Layers over devices: recurrent networks trained in a pipeline, over time chunks or over micro-batches."""
