"""Gradients are averaged over all ranks in every step, by the parallel strategy: one model."""

from __future__ import annotations

from pipeline.sync import _interface


class Method(_interface.Method):
    replicas = False
    tests_batches = True
