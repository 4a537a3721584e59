// The order in which samples are drawn from sources whose weights change: constant stretches and linear ramps.
//
// Weights of one constant stretch give the order of fill_blend (indices.hpp) bit for bit. Left out: reading any sample.
#pragma once

#include <cstdint>
#include <vector>

namespace trireme {

// From sample `first` up to `end` the weight of source k goes linearly from from[k] to to[k]; each sums to 1 over k.
// Where the two differ, `end` is what the ramp's slope is made of, also when the draw stops before it.
struct Stretch {
    int64_t first;
    int64_t end;
    const double* from;
    const double* to;
};

// A source that has given all it may: from sample `at` on it is not drawn any more.
struct Departure {
    int64_t source;
    int64_t at;
};

// What fill_mixture did: `size` samples, fewer than asked for where no source was left.
struct Drawn {
    int64_t size;
    std::vector<Departure> departures;
};

// Draws `size` samples, always from the source that is furthest behind its cumulated weight. stretches: in order, without gaps, from
// sample 0 to at least `size`. A source is never drawn while its weight is 0; sample[i] counts on within each source.
// caps[k]: how often source k may be drawn. With its last sample it leaves, and its weight goes to the others in proportion to theirs.
Drawn fill_mixture(const std::vector<Stretch>& stretches, const std::vector<int64_t>& caps, int64_t size, int16_t* source, int64_t* sample);

}  // namespace trireme
