"""Fill in the middle (arXiv 2207.14255): documents whose middle is moved behind their suffix, so that a model learns to infill.

    fim = FillMiddle(rate=0.5, spm_rate=0.5, prefix_id=1, middle_id=2, suffix_id=3, eod_id=0, seed=1234)
    text = fim(text, sample_numbers)          # int64 [b, seq_len + 1] of engine/data/pretraining.py, changed

What lies between two EODs of a sample is one segment: a document, or the part of one that the sample holds. A segment chosen with
probability `rate` is cut at two uniform places and becomes, with probability `spm_rate`, SPM, else PSM:

    PSM    <prefix> prefix <suffix> suffix <middle> middle
    SPM    <prefix> <suffix> suffix <middle> prefix middle          (the paper's second form, which shares its order of tokens with PSM)

Lengths stay: the three new tokens take the place of the segment's last three, so every EOD, and with them masks and positions,
stay where they are, and a segment of less than four tokens stays as it is. Random numbers come from the seed and the sample's number
alone, hence the same under every layout and after every resume, and others in every epoch. Megatron-LM's FIM dataset also works
sample by sample and document by document, but lets documents grow and cuts the sample's end.
Left out: cuts between characters instead of tokens, and whole documents before they are cut into samples.
"""

from __future__ import annotations

import numpy as np

NUM_SENTINELS = 3


class FillMiddle:
    """The change of text into fill-in-the-middle text, as data.fim says."""

    def __init__(self, rate: float, spm_rate: float, prefix_id: int, middle_id: int, suffix_id: int, eod_id: int, seed: int) -> None:
        self.rate, self.spm_rate, self.eod_id, self.seed = rate, spm_rate, eod_id, seed
        self.prefix, self.middle, self.suffix = (np.array([token], dtype=np.int64) for token in (prefix_id, middle_id, suffix_id))

    def __call__(self, text: np.ndarray, sample_numbers: np.ndarray) -> np.ndarray:
        """text: int64 [b, n]; one sample number for each row. Returns [b, n]."""
        text = text.copy()
        for row, number in zip(text, np.asarray(sample_numbers).tolist()):
            bounds = self._bounds(row)
            random = np.random.Generator(np.random.Philox(key=[self.seed, number]))
            draws = random.random((len(bounds), 4))
            for k in np.flatnonzero(draws[:, 0] < self.rate):
                begin, end = bounds[k]
                row[begin:end] = self.transformed(row[begin:end], *draws[k, 1:])
        return text

    def _bounds(self, row: np.ndarray) -> np.ndarray:
        """Begin and end of each segment, its EOD not included; int64 [segments, 2]."""
        ends = np.append(np.flatnonzero(row == self.eod_id), row.size)
        return np.stack([np.append(0, ends[:-1] + 1), ends], axis=1)

    def transformed(self, segment: np.ndarray, spm_draw: float, *cut_draws: float) -> np.ndarray:
        """One segment, chosen; the draws are uniform in [0, 1)."""
        kept = segment[:-NUM_SENTINELS]
        if not kept.size:
            return segment
        low, high = sorted(int(draw * (kept.size + 1)) for draw in cut_draws)
        prefix, middle, suffix = kept[:low], kept[low:high], kept[high:]
        if spm_draw < self.spm_rate:
            return np.concatenate([self.prefix, self.suffix, suffix, self.middle, prefix, middle])
        return np.concatenate([self.prefix, prefix, self.suffix, suffix, self.middle, middle])
