"""From text to batches: tokenised once into memory-mapped files, read in one fixed order."""

from pipeline.data.corpus import Corpus, prepare
from pipeline.data.fingerprint import fingerprint
from pipeline.data.permutation import permute
from pipeline.data.stream import Prefetcher, Stream

__all__ = ["Corpus", "Prefetcher", "Stream", "fingerprint", "permute", "prepare"]
