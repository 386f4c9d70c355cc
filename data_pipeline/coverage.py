"""Proof that the ranks together read exactly an epoch's images: counts, and a hash that does not depend on the order.

An image counts as often as the epoch's order has it: never or several times where `data.balance` or repeats ask for it.

A rank started twice, a node whose folder holds other files, or a bug of ours would otherwise train on some images twice
and on others never, and nobody would notice.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

CoverageSums = NDArray[np.int64]
"""[6]: count and checksum of the samples that a rank has read, of its share, and of the samples of all ranks together."""


def sample_hashes(paths: list[str]) -> NDArray[np.int64]:
    """Compute [N] a hash of each sample's name; sums of hashes, modulo 2^64, tell multisets of samples apart."""
    sums = np.fromiter((zlib.crc32(path.encode(errors="surrogateescape")) for path in paths), np.uint64, len(paths))
    return (sums * np.uint64(0x9E3779B97F4A7C15) ^ (sums >> np.uint64(7))).view(np.int64)


def checksum(hashes: NDArray[np.int64]) -> tuple[int, int]:
    """Count and checksum of samples with these hashes."""
    return len(hashes), int(hashes.sum())


def first_fault(sums: NDArray[np.int64]) -> str | None:
    """Describe the first fault in the `sums` [world, 6] of all ranks; None where there is none."""
    read, share, whole = sums[:, 0:2], sums[:, 2:4], sums[:, 4:6]
    for rank in np.flatnonzero((whole != whole[0]).any(axis=1)):
        return f"rank {rank} finds other images than rank 0; make data.path the same on every node"
    for rank in np.flatnonzero((read != share).any(axis=1)):
        return (
            f"rank {rank} read {read[rank, 0]} images of this epoch, and other ones than its share of {share[rank, 0]}"
        )
    if (read.sum(axis=0) != whole[0]).any():
        return f"the ranks read {read[:, 0].sum()} images where the epoch has {whole[0, 0]}: their shares overlap"
    return None
