#include "indices.hpp"

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "error.hpp"
#include "furthest.hpp"

namespace trireme {

namespace {

constexpr int64_t block = 4096;  // lengths gathered at a time: they stay in the nearest cache

// A constant weight. The two roundings, of the product and of the difference, are part of the order.
struct Constant {
    static constexpr size_t size = 1;
    std::array<double, size> coefficients;

    template <class Numbers>
    static auto at(const Numbers& c, double t) {
        return c[0] * t;
    }
};

// Fetches the lengths of `count` documents and returns their sum. The reads are independent, so that many cache misses are under way.
int64_t gather_lengths(const int32_t* lengths, int64_t num_lengths, const int32_t* documents, int64_t count, int32_t* gathered) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t document = documents[i];
        if (document < 0 || document >= num_lengths) throw std::out_of_range(message("document ", document, " of ", num_lengths));
        gathered[i] = lengths[document];
        total += gathered[i];
    }
    return total;
}

void draw(std::vector<Source<Constant>> sources, int64_t size, int16_t* dataset, int64_t* sample) {
    if (size == 0) return;
    FurthestBehind<Constant> behind(std::move(sources), 0, size, static_cast<double>(size));
    for (int64_t i = 0; i < size; ++i) {
        const Draw drawn = behind.next(i, static_cast<double>(std::max<int64_t>(i, 1)));
        dataset[i] = static_cast<int16_t>(drawn.source);
        sample[i] = drawn.sample;
    }
}

}  // namespace

int64_t count_tokens(const int32_t* lengths, int64_t num_lengths, const int32_t* documents, int64_t count) {
    int32_t gathered[block];
    int64_t total = 0;
    for (int64_t first = 0; first < count; first += block) {
        total += gather_lengths(lengths, num_lengths, documents + first, std::min(block, count - first), gathered);
    }
    return total;
}

template <class Index>
int64_t fill_sample_index(const int32_t* lengths, int64_t num_lengths, const int32_t* documents, int64_t count, int64_t seq_len, int64_t num_samples,
                          Index* rows) {
    rows[0] = rows[1] = 0;
    int32_t gathered[block];
    int64_t sample = 1, end = 0, total = 0;  // end: of the documents walked over, in tokens
    int64_t target = seq_len;                // neighbouring samples share one token, so sample r starts at token r * seq_len
    for (int64_t first = 0; first < count; first += block) {
        const int64_t num = std::min(block, count - first);
        total += gather_lengths(lengths, num_lengths, documents + first, num, gathered);
        for (int64_t i = 0; i < num && sample <= num_samples; ++i) {
            const int64_t begin = end;
            end += gathered[i];
            // Written whether or not a sample starts here: most documents start none, unpredictably, and a wrong guess costs more than a write.
            do {
                rows[2 * sample] = static_cast<Index>(first + i);
                rows[2 * sample + 1] = static_cast<Index>(target - begin);
                const bool starts_here = target < end;
                sample += starts_here;
                target += starts_here ? seq_len : 0;
            } while (target < end && sample <= num_samples);
        }
    }
    if (sample <= num_samples) throw DataError(message("documents of ", total, " tokens hold no ", num_samples, " samples of ", seq_len));
    return total;
}

template int64_t fill_sample_index<int32_t>(const int32_t*, int64_t, const int32_t*, int64_t, int64_t, int64_t, int32_t*);
template int64_t fill_sample_index<int64_t>(const int32_t*, int64_t, const int32_t*, int64_t, int64_t, int64_t, int64_t*);

void fill_blend(const std::vector<double>& weights, int64_t size, int16_t* dataset, int64_t* sample) {
    std::vector<Source<Constant>> sources;
    for (size_t k = 0; k < weights.size(); ++k) sources.push_back({static_cast<int32_t>(k), {{weights[k]}}, weights[k], 0, unlimited});
    draw(std::move(sources), size, dataset, sample);
}

void fill_exhaustive_blend(const std::vector<int64_t>& sizes, int16_t* dataset, int64_t* sample) {
    const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    std::vector<Source<Constant>> sources;
    for (size_t k = 0; k < sizes.size(); ++k) {
        const double weight = static_cast<double>(sizes[k]) / static_cast<double>(total);
        sources.push_back({static_cast<int32_t>(k), {{weight}}, weight, 0, sizes[k]});
    }
    draw(std::move(sources), total, dataset, sample);
}

}  // namespace trireme
