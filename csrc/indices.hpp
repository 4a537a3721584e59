// The orders in which samples are drawn: where each sample starts, and which dataset each blended sample comes from.
//
// Pure functions from arrays to arrays, equal bit for bit to Megatron's; nothing here reads a file.
// Left out: samples without the extra token and a last, shorter sample.
#pragma once

#include <cstdint>
#include <vector>

namespace trireme {

// Number of samples of seq_len tokens plus one shared token that num_tokens tokens hold.
inline int64_t count_samples(int64_t num_tokens, int64_t seq_len) {
    return num_tokens > 0 ? (num_tokens - 1) / seq_len : 0;
}

// rows: [num_samples + 1, 2], (position in documents, token offset in that document) of the first token of each sample.
// documents must hold more than num_samples * seq_len tokens; Index is int32_t or int64_t.
template <class Index>
void fill_sample_index(const int32_t* lengths, const int32_t* documents, int64_t seq_len, int64_t num_samples, Index* rows) {
    rows[0] = rows[1] = 0;
    int64_t position = 0;  // in documents
    int64_t start = 0;     // tokens before that document
    for (int64_t sample = 1; sample <= num_samples; ++sample) {
        // Neighbouring samples share one token, so sample r starts at token r * seq_len.
        const int64_t target = sample * seq_len;
        while (start + lengths[documents[position]] <= target) start += lengths[documents[position++]];
        rows[2 * sample] = static_cast<Index>(position);
        rows[2 * sample + 1] = static_cast<Index>(target - start);
    }
}

// Draws `size` samples so that each dataset's count stays closest to its weight. weights sum to 1.
void fill_blend(const std::vector<double>& weights, int64_t size, int16_t* dataset, int64_t* sample);

// Draws all of every dataset, in proportion to their sizes; the two outputs hold sum(sizes) entries.
void fill_exhaustive_blend(const std::vector<int64_t>& sizes, int16_t* dataset, int64_t* sample);

}  // namespace trireme
