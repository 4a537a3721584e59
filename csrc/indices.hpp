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

// Tokens of `count` documents. Throws std::out_of_range for a document number outside [0, num_lengths).
int64_t count_tokens(const int32_t* lengths, int64_t num_lengths, const int32_t* documents, int64_t count);

// rows: [num_samples + 1, 2], (position in documents, token offset in that document) of the first token of each sample.
// Returns the tokens of all documents. Throws the same, and DataError for fewer than num_samples * seq_len + 1 of them.
// Index is int32_t or int64_t.
template <class Index>
int64_t fill_sample_index(const int32_t* lengths, int64_t num_lengths, const int32_t* documents, int64_t count, int64_t seq_len, int64_t num_samples,
                          Index* rows);

// Draws `size` samples so that each dataset's count stays closest to its weight. weights sum to 1.
void fill_blend(const std::vector<double>& weights, int64_t size, int16_t* dataset, int64_t* sample);

// Draws all of every dataset, in proportion to their sizes; the two outputs hold sum(sizes) entries.
void fill_exhaustive_blend(const std::vector<int64_t>& sizes, int16_t* dataset, int64_t* sample);

}  // namespace trireme
