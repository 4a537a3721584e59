// Copies the tokens of chosen samples out of a mapped corpus into one dense block.
//
// In: the corpus, the document index, the sample index and the rows wanted. Out: int64 tokens [num_rows, seq_len + 1]
// and, on request, int32 segment ids [num_rows, seq_len]. Left out: shuffling (the caller maps sample numbers to rows).
#pragma once

#include <cstdint>

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

// segments may be null. A segment id is the running number, from 0, of the document within its row.
// Throws DataError when an index does not fit the corpus (a stale or damaged cache).
template <class Index>
void gather(const Corpus& corpus, const SampleTable<Index>& table, const int64_t* rows, int64_t num_rows,
            int64_t* tokens, int32_t* segments, int num_threads);

extern template void gather<int32_t>(const Corpus&, const SampleTable<int32_t>&, const int64_t*, int64_t, int64_t*, int32_t*, int);
extern template void gather<int64_t>(const Corpus&, const SampleTable<int64_t>&, const int64_t*, int64_t, int64_t*, int32_t*, int);

}  // namespace trireme
