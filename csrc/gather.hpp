// Copies the tokens of chosen samples out of a corpus into one dense block.
//
// In: the corpus, the document index, the sample index and the rows wanted. Out: int64 tokens [num_rows, seq_len + 1]
// and, on request, int32 segment ids [num_rows, seq_len]. A mapped corpus
// is copied row after row; of one read on demand all pieces are asked for first, then read in the order in which they lie in the file.
// Left out: shuffling (the caller maps sample numbers to rows).
#pragma once

#include <cstdint>
#include <vector>

#include "corpus.hpp"

namespace trireme {

template <class Index>
struct SampleTable {
    const int32_t* documents;  // [num_documents] sequence numbers in the corpus
    int64_t num_documents;
    const Index* starts;  // [num_samples + 1, 2]
    int64_t num_samples;
    int64_t seq_len;
};

// Where the rows go. The memory is the caller's: a pinned or shared buffer is filled in place.
struct Block {
    int64_t* tokens;        // [>= num_rows, seq_len + 1]
    int32_t* segments;      // [as tokens, seq_len], or null; a segment id is the running number, from 0, of the document within its row
    const int64_t* places;  // [num_rows] row of the block for each row wanted, all different; null: the same order
};

// Throws DataError when an index does not fit the corpus (a stale or damaged cache).
template <class Index>
void gather(const Corpus& corpus, const SampleTable<Index>& table, const int64_t* rows, int64_t num_rows, const Block& out, int num_threads);

// The bytes of the .bin that these rows are made of, sorted by offset; pieces may overlap.
template <class Index>
std::vector<Extent> sample_extents(const Corpus& corpus, const SampleTable<Index>& table, const int64_t* rows, int64_t num_rows);

extern template void gather<int32_t>(const Corpus&, const SampleTable<int32_t>&, const int64_t*, int64_t, const Block&, int);
extern template void gather<int64_t>(const Corpus&, const SampleTable<int64_t>&, const int64_t*, int64_t, const Block&, int);
extern template std::vector<Extent> sample_extents<int32_t>(const Corpus&, const SampleTable<int32_t>&, const int64_t*, int64_t);
extern template std::vector<Extent> sample_extents<int64_t>(const Corpus&, const SampleTable<int64_t>&, const int64_t*, int64_t);

}  // namespace trireme
