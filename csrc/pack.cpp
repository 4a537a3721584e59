#include "pack.hpp"

#include <algorithm>
#include <map>
#include <numeric>

#include "error.hpp"

namespace trireme {

namespace {

std::vector<int64_t> longest_first(const int32_t* lengths, int64_t count) {
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [lengths](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    return order;
}

void check_lengths(const int32_t* lengths, int64_t count, int64_t capacity) {
    for (int64_t i = 0; i < count; ++i) {
        if (lengths[i] < 1 || lengths[i] > capacity) {
            throw DataError(message("document ", i, " has ", lengths[i], " tokens, but a row holds 1 to ", capacity, "; drop or truncate it first"));
        }
    }
}

}  // namespace

Rows pack_best_fit(const int32_t* lengths, int64_t count, int64_t capacity) {
    check_lengths(lengths, count, capacity);
    const std::vector<int64_t> order = longest_first(lengths, count);
    std::vector<int64_t> row_of(count);
    std::map<int64_t, std::vector<int64_t>> open;  // room left -> rows with that much, so it has at most `capacity` entries
    int64_t num_rows = 0;
    for (const int64_t document : order) {
        const int64_t length = lengths[document];
        int64_t row = num_rows, room = capacity;
        if (const auto tightest = open.lower_bound(length); tightest != open.end()) {
            room = tightest->first;
            row = tightest->second.back();
            tightest->second.pop_back();
            if (tightest->second.empty()) open.erase(tightest);
        } else {
            ++num_rows;
        }
        row_of[document] = row;
        if (room > length) open[room - length].push_back(row);
    }

    Rows rows{std::vector<int64_t>(count), std::vector<int64_t>(num_rows + 1)};
    for (const int64_t row : row_of) ++rows.starts[row + 1];
    std::partial_sum(rows.starts.begin(), rows.starts.end(), rows.starts.begin());
    std::vector<int64_t> next(rows.starts.begin(), rows.starts.end() - 1);
    for (const int64_t document : order) rows.documents[next[row_of[document]]++] = document;
    return rows;
}

}  // namespace trireme
