#include "mixture.hpp"

#include <algorithm>
#include <array>
#include <utility>

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

Course course_of(const Stretch& stretch, int64_t k, double before) {
    const double rise = stretch.to[k] - stretch.from[k];
    return {{before, stretch.from[k], rise == 0 ? 0 : rise / (2 * static_cast<double>(stretch.end - stretch.first))}};
}

}  // namespace

void fill_mixture(const std::vector<Stretch>& stretches, int64_t num_sources, int64_t size, int16_t* source, int64_t* sample) {
    std::vector<double> cumulated(static_cast<size_t>(num_sources), 0.0);
    std::vector<int64_t> counts(static_cast<size_t>(num_sources), 0);
    for (const Stretch& stretch : stretches) {
        const double length = static_cast<double>(stretch.end - stretch.first);
        const int64_t end = std::min(stretch.end, size);
        std::vector<Source<Course>> sources;
        for (int64_t k = 0; k < num_sources; ++k) {
            const Course course = course_of(stretch, k, cumulated[k]);
            cumulated[k] = Course::at(course.coefficients, length);
            // What is left of a deficit when a weight falls to 0 must not draw one more sample of that source.
            if (stretch.from[k] == 0 && stretch.to[k] == 0) continue;
            sources.push_back({static_cast<int32_t>(k), course, std::max(stretch.from[k], stretch.to[k]), counts[k], unlimited});
        }
        if (end <= stretch.first) continue;
        FurthestBehind<Course> behind(std::move(sources), stretch.first, end, length);
        for (int64_t i = stretch.first; i < end; ++i) {
            const double t = static_cast<double>(std::max<int64_t>(i, 1) - stretch.first);  // Megatron's rule starts as if one was drawn
            const Draw drawn = behind.next(i, t);
            source[i] = static_cast<int16_t>(drawn.source);
            sample[i] = drawn.sample;
            counts[drawn.source] = drawn.sample + 1;
        }
    }
}

}  // namespace trireme
