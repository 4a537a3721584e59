#include "indices.hpp"

#include <algorithm>
#include <numeric>

namespace trireme {

namespace {

// The candidate that is furthest behind its share after `drawn` samples; the first of equals.
size_t furthest_behind(const std::vector<size_t>& candidates, const std::vector<double>& weights,
                       const std::vector<int64_t>& counts, int64_t drawn) {
    const double total = static_cast<double>(std::max<int64_t>(drawn, 1));
    const auto lag = [&](size_t k) { return weights[k] * total - static_cast<double>(counts[k]); };
    size_t best = candidates.front();
    double best_lag = lag(best);
    for (size_t k : candidates) {
        const double this_lag = lag(k);
        if (this_lag > best_lag) {
            best = k;
            best_lag = this_lag;
        }
    }
    return best;
}

std::vector<size_t> first_integers(size_t count) {
    std::vector<size_t> integers(count);
    std::iota(integers.begin(), integers.end(), size_t{0});
    return integers;
}

}  // namespace

void fill_blend(const std::vector<double>& weights, int64_t size, int16_t* dataset, int64_t* sample) {
    const auto candidates = first_integers(weights.size());
    std::vector<int64_t> counts(weights.size(), 0);
    for (int64_t i = 0; i < size; ++i) {
        const size_t k = furthest_behind(candidates, weights, counts, i);
        dataset[i] = static_cast<int16_t>(k);
        sample[i] = counts[k]++;
    }
}

void fill_exhaustive_blend(const std::vector<int64_t>& sizes, int16_t* dataset, int64_t* sample) {
    const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    std::vector<double> weights(sizes.size());
    for (size_t k = 0; k < sizes.size(); ++k) weights[k] = static_cast<double>(sizes[k]) / static_cast<double>(total);
    auto unspent = first_integers(sizes.size());
    std::vector<int64_t> counts(sizes.size(), 0);
    for (int64_t i = 0; i < total; ++i) {
        const size_t k = furthest_behind(unspent, weights, counts, i);
        dataset[i] = static_cast<int16_t>(k);
        sample[i] = counts[k]++;
        if (counts[k] == sizes[k]) unspent.erase(std::find(unspent.begin(), unspent.end(), k));
    }
}

}  // namespace trireme
