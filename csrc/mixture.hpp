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

// Draws `size` samples, always from the source that is furthest behind its cumulated weight. stretches: in order, without gaps, from
// sample 0 to at least `size`. A source is never drawn while its weight is 0; sample[i] counts on within each source.
void fill_mixture(const std::vector<Stretch>& stretches, int64_t num_sources, int64_t size, int16_t* source, int64_t* sample);

}  // namespace trireme
