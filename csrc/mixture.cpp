#include "mixture.hpp"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "furthest.hpp"

namespace trireme {

namespace {

// One source within one stretch: its cumulated weight is before + slope * t + curve * t * t after t samples of the stretch.
struct Course {
    static constexpr size_t size = 3;
    std::array<double, size> coefficients;  // before, slope, curve

    template <class Numbers>
    static auto at(const Numbers& c, double t) {
        return c[0] + (c[1] * t + c[2] * t * t);
    }
};

// A stretch, or what is left of it, without the sources that are spent.
struct Piece {
    int64_t first;
    int64_t end;
    std::vector<double> from;
    std::vector<double> to;

    double length() const { return static_cast<double>(end - first); }
};

Piece whole(const Stretch& stretch, size_t num_sources) {
    return {stretch.first, stretch.end, {stretch.from, stretch.from + num_sources}, {stretch.to, stretch.to + num_sources}};
}

// The part of a piece that begins at sample `first`.
Piece rest(Piece piece, int64_t first) {
    const double done = static_cast<double>(first - piece.first) / piece.length();
    for (size_t k = 0; k < piece.from.size(); ++k) piece.from[k] += (piece.to[k] - piece.from[k]) * done;
    piece.first = first;
    return piece;
}

// Gives the weight of spent sources to the others, at both ends of the piece; false where there are no others. Where the others have
// no weight at one end only, they keep the proportions of the other end, which is where the ramp comes from or goes to.
bool share_out(Piece& piece, const std::vector<bool>& is_spent) {
    double lost[2] = {0, 0}, left[2] = {0, 0};
    std::vector<double>* ends[2] = {&piece.from, &piece.to};
    for (int e = 0; e < 2; ++e) {
        for (size_t k = 0; k < is_spent.size(); ++k) (is_spent[k] ? lost : left)[e] += (*ends[e])[k];
    }
    if (left[0] == 0 && left[1] == 0) return false;
    const Piece before = piece;
    for (int e = 0; e < 2; ++e) {
        if (lost[e] == 0) continue;  // to divide by a sum that is nearly 1 would change the last bits
        const int other = left[e] == 0 ? 1 - e : e;
        const std::vector<double>& proportions = other == 0 ? before.from : before.to;
        for (size_t k = 0; k < is_spent.size(); ++k) (*ends[e])[k] = is_spent[k] ? 0 : proportions[k] / left[other];
    }
    return true;
}

Course course_of(const Piece& piece, size_t k, double before) {
    const double rise = piece.to[k] - piece.from[k];
    return {{before, piece.from[k], rise == 0 ? 0 : rise / (2 * piece.length())}};
}

// What a run of draws keeps from one piece to the next.
struct State {
    std::vector<double> cumulated;
    std::vector<int64_t> counts;
    std::vector<bool> is_spent;
};

// Draws the samples of a piece up to `end`, or up to the one with which a source is spent. Returns that source, or -1, and the next sample.
std::pair<int64_t, int64_t> draw_piece(const Piece& piece, int64_t end, const std::vector<int64_t>& caps, State& state, int16_t* source, int64_t* sample) {
    std::vector<Source<Course>> sources;
    for (size_t k = 0; k < caps.size(); ++k) {
        // What is left of a deficit when a weight falls to 0 must not draw one more sample of that source.
        if (piece.from[k] == 0 && piece.to[k] == 0) continue;
        const Course course = course_of(piece, k, state.cumulated[k]);
        sources.push_back({static_cast<int32_t>(k), course, std::max(piece.from[k], piece.to[k]), state.counts[k], unlimited});
    }
    FurthestBehind<Course> behind(std::move(sources), piece.first, end, piece.length());
    for (int64_t i = piece.first; i < end; ++i) {
        const double t = static_cast<double>(std::max<int64_t>(i, 1) - piece.first);  // Megatron's rule starts as if one was drawn
        const Draw drawn = behind.next(i, t);
        source[i] = static_cast<int16_t>(drawn.source);
        sample[i] = drawn.sample;
        state.counts[static_cast<size_t>(drawn.source)] = drawn.sample + 1;
        if (drawn.sample + 1 == caps[static_cast<size_t>(drawn.source)]) return {drawn.source, i + 1};
    }
    return {-1, piece.end};
}

}  // namespace

Drawn fill_mixture(const std::vector<Stretch>& stretches, const std::vector<int64_t>& caps, int64_t size, int16_t* source, int64_t* sample) {
    Drawn result = {size, {}};
    State state = {std::vector<double>(caps.size(), 0.0), std::vector<int64_t>(caps.size(), 0), std::vector<bool>(caps.size(), false)};
    const auto leave = [&](int64_t k, int64_t at) {
        state.is_spent[static_cast<size_t>(k)] = true;
        result.departures.push_back({k, at});
    };
    for (size_t k = 0; k < caps.size(); ++k) {
        if (caps[k] <= 0) leave(static_cast<int64_t>(k), 0);
    }
    for (const Stretch& stretch : stretches) {
        Piece piece = whole(stretch, caps.size());
        while (piece.first < std::min(piece.end, size)) {
            if (!share_out(piece, state.is_spent)) {
                result.size = piece.first;
                return result;
            }
            const auto [spent, next] = draw_piece(piece, std::min(piece.end, size), caps, state, source, sample);
            for (size_t k = 0; k < caps.size(); ++k) {
                state.cumulated[k] = Course::at(course_of(piece, k, state.cumulated[k]).coefficients, static_cast<double>(next - piece.first));
            }
            if (spent >= 0) leave(spent, next);
            piece = rest(std::move(piece), next);
        }
    }
    return result;
}

}  // namespace trireme
