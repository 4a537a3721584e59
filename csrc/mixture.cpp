#include "mixture.hpp"

#include <algorithm>
#include <limits>

namespace trireme {

namespace {

// One source within one stretch: its cumulated weight is before + slope * t + curve * t * t after t samples of the stretch.
struct Share {
    int16_t source;
    double before;
    double slope;
    double curve;

    double at(double t) const { return before + (slope * t + curve * t * t); }
};

std::vector<Share> shares_of(const Stretch& stretch, const std::vector<double>& cumulated) {
    std::vector<Share> shares(cumulated.size());
    const double length = static_cast<double>(stretch.end - stretch.first);
    for (size_t k = 0; k < shares.size(); ++k) {
        const double rise = stretch.to[k] - stretch.from[k];
        shares[k] = {static_cast<int16_t>(k), cumulated[k], stretch.from[k], rise == 0 ? 0 : rise / (2 * length)};
    }
    return shares;
}

}  // namespace

void fill_mixture(const std::vector<Stretch>& stretches, int64_t num_sources, int64_t size, int16_t* source, int64_t* sample) {
    std::vector<double> cumulated(static_cast<size_t>(num_sources), 0.0);
    std::vector<int64_t> counts(static_cast<size_t>(num_sources), 0);
    for (const Stretch& stretch : stretches) {
        std::vector<Share> shares = shares_of(stretch, cumulated);
        for (const Share& share : shares) cumulated[share.source] = share.at(static_cast<double>(stretch.end - stretch.first));
        // What is left of a deficit when a weight falls to 0 must not draw one more sample of that source.
        shares.erase(std::remove_if(shares.begin(), shares.end(), [](const Share& s) { return s.slope == 0 && s.curve == 0; }), shares.end());
        for (int64_t i = stretch.first; i < std::min(stretch.end, size); ++i) {
            const double t = static_cast<double>(std::max<int64_t>(i, 1) - stretch.first);  // Megatron's rule starts as if one was drawn
            int16_t best = shares.front().source;
            double best_lag = -std::numeric_limits<double>::infinity();
            for (const Share& share : shares) {
                const double lag = share.at(t) - static_cast<double>(counts[share.source]);
                if (lag > best_lag) {
                    best = share.source;
                    best_lag = lag;
                }
            }
            source[i] = best;
            sample[i] = counts[best]++;
        }
    }
}

}  // namespace trireme
