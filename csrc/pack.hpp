// Putting documents of known length into rows of one capacity: best-fit decreasing.
//
// In: lengths, each from 1 to the capacity. Out: the documents of each row. Deterministic: equal lengths go in the order given.
// Never more than 11/9 of the fewest rows possible, and a few (Johnson et al., SIAM J. Comput. 3(4), 1974).
// Left out: an exact optimum, and rows of different capacities.
#pragma once

#include <cstdint>
#include <vector>

namespace trireme {

struct Rows {
    std::vector<int64_t> documents;  // all documents, row after row, each row's longest first
    std::vector<int64_t> starts;     // [rows + 1]: row r is documents[starts[r]] up to documents[starts[r + 1]]
};

// O(n log n). Throws DataError for a length outside [1, capacity].
Rows pack_best_fit(const int32_t* lengths, int64_t count, int64_t capacity);

}  // namespace trireme
