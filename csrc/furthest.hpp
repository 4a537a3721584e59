// Which of many sources is furthest behind its share, asked sample after sample.
//
// In: for each source its share, a function of time, and its count of samples drawn. Out: at each step the source with the greatest
// lag = share.at(t) - count, the lowest number among equals; its count then rises by one. Lags are compared as the doubles they are, so the
// order is that of a loop over all sources, bit for bit. Two things spare that loop:
//   - sources of equal share and equal count take turns in the order of their numbers, so they are kept as one group;
//   - a group whose lag is beneath `floor` waits in a calendar for the first step at which it can have reached it. While some active group's
//     lag is at the floor or above, no waiting group can be the furthest behind. When none is, a new floor is set from all lags.
// Lags spread over about 1 and their maximum moves little where many sources are alive, so few groups are active at a time.
// Left out: sources that join later.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace trireme {

// Two doubles that are computed with side by side (GCC and Clang, any processor).
typedef double Pair __attribute__((vector_size(16)));
typedef int64_t PairMask __attribute__((vector_size(16)));

// Bit 0 and bit 1: whether the first and the second number of a equal x.
inline uint64_t equal_bits(Pair a, double x) {
#ifdef __SSE2__
    return static_cast<uint64_t>(_mm_movemask_pd(_mm_cmpeq_pd(a, _mm_set1_pd(x))));
#else
    return static_cast<uint64_t>(a[0] == x) | static_cast<uint64_t>(a[1] == x) << 1;
#endif
}

constexpr int64_t unlimited = std::numeric_limits<int64_t>::max();

// A Share is an array of doubles, `coefficients`, and a static at(coefficients, t) that works on doubles and on pairs.
template <class Share>
struct Source {
    int32_t number;
    Share share;    // grows with t or stays
    double rate;    // share.at grows by at most this per unit of t
    int64_t count;  // samples drawn so far
    int64_t limit;  // the count at which the source is spent
};

struct Draw {
    int32_t source;
    int64_t sample;  // its number within the source
};

template <class Share>
class FurthestBehind {
  public:
    // Steps first up to end; t rises by at most one per step, and share.at is finite up to t_end.
    FurthestBehind(std::vector<Source<Share>> sources, int64_t first, int64_t end, double t_end) : last_reset_(first) {
        make_groups(std::move(sources));
        double magnitude = static_cast<double>(end) + 1;  // of the numbers that lags are differences of
        for (const Group& group : groups_) {
            magnitude = std::max(magnitude, std::abs(Share::at(group.share.coefficients, t_end)) + static_cast<double>(group.round));
        }
        slack_ = std::ldexp(magnitude, -49);  // several times the rounding errors of two lags
        const size_t num_pairs = (groups_.size() / (2 * block) + 1) * block;
        active_.resize(groups_.size());
        for (auto& column : coefficients_) column.resize(num_pairs, Pair{0, 0});
        counts_.resize(num_pairs);
        lags_.resize(num_pairs);
        size_t num_days = 1024;
        while (num_days < 4 * groups_.size()) num_days *= 2;
        days_.resize(num_days);
        window_ = 5.0 / static_cast<double>(groups_.size());
    }

    // For every step in turn. At least one source must not be spent.
    Draw next(int64_t step, double t) {
        if (groups_.size() <= few) return draw_of_few(t);
        if (is_fresh_) reset(step, t);
        arrive(step);
        double greatest = greatest_lag(t);
        if ((greatest < floor_ || num_active_ > max_active_) && change_floor(step, t, greatest)) greatest = greatest_lag(t);
        const size_t at = place_of(greatest);
        Group& group = groups_[active_[at]];
        const Draw draw{members_[group.cursor], group.round};
        if (++group.cursor == group.end) finish_round(at, group, greatest, step);
        return draw;
    }

  private:
    static constexpr double infinity = std::numeric_limits<double>::infinity();
    static constexpr size_t block = 8;  // pairs computed with at a time, without branches
    static constexpr size_t few = 6, some = 4 * block;  // groups: up to few are walked over plainly, up to some are always active

    struct Group {
        Share share;
        double inverse_rate;
        int64_t round;  // the count of the members from cursor on; those before it have one more
        int64_t limit;
        int32_t begin, end, cursor;  // in members_
        int32_t next;                // in the list of the day it waits for
        int64_t due;
    };

    static double lag_of(const Group& group, double t) { return Share::at(group.share.coefficients, t) - static_cast<double>(group.round); }

    void make_groups(std::vector<Source<Share>> sources) {
        const auto key = [](const Source<Share>& s) { return std::make_tuple(s.share.coefficients, s.count, s.limit); };
        std::sort(sources.begin(), sources.end(), [&](const auto& a, const auto& b) {
            return std::make_tuple(key(a), a.number) < std::make_tuple(key(b), b.number);
        });
        for (size_t k = 0; k < sources.size(); ++k) {
            const Source<Share>& source = sources[k];
            const int32_t place = static_cast<int32_t>(k);
            if (k == 0 || key(source) != key(sources[k - 1])) {
                groups_.push_back({source.share, 1 / source.rate, source.count, source.limit, place, place, place, -1, 0});
            }
            members_.push_back(source.number);
            groups_.back().end = place + 1;
        }
    }

    // Plainly, all of them: with few groups nothing is quicker.
    Draw draw_of_few(double t) {
        Group* best = nullptr;
        double best_lag = 0;
        for (Group& group : groups_) {
            if (group.due == spent) continue;
            const double lag = lag_of(group, t);
            if (!best || lag > best_lag || (lag == best_lag && members_[group.cursor] < members_[best->cursor])) {
                best = &group;
                best_lag = lag;
            }
        }
        const Draw draw{members_[best->cursor], best->round};
        if (++best->cursor == best->end) {
            best->cursor = best->begin;
            if (++best->round == best->limit) best->due = spent;
        }
        return draw;
    }

    // --- the active groups: arrays side by side, filled up to whole blocks with what never leads

    void activate(int32_t group) {
        active_[num_active_] = group;
        place(num_active_++, groups_[group]);
    }

    void place(size_t at, const Group& group) {
        for (size_t c = 0; c < Share::size; ++c) put(coefficients_[c], at, group.share.coefficients[c]);
        put(counts_, at, static_cast<double>(group.round));
    }

    void deactivate(size_t at) {
        const size_t last = --num_active_;
        active_[at] = active_[last];
        for (auto& column : coefficients_) put(column, at, column[last / 2][last % 2]);
        put(counts_, at, counts_[last / 2][last % 2]);
        put(counts_, last, infinity);
    }

    // Writes the whole pair: a read of a pair that was written by halves has to wait for the cache.
    static void put(std::vector<Pair>& column, size_t at, double value) {
        static constexpr PairMask half[2] = {{-1, 0}, {0, -1}};  // looked up: a branch on `at` would be guessed wrong every other time
        column[at / 2] = half[at % 2] ? Pair{value, value} : column[at / 2];
    }

    size_t num_blocks() const { return (num_active_ + 2 * block - 1) / (2 * block); }

    double greatest_lag(double t) {
        Pair best[4];  // several: each maximum waits for the one before
        for (Pair& pair : best) pair = Pair{-infinity, -infinity};
        for (size_t first = 0; first < num_blocks() * block; first += block) {
            for (size_t p = 0; p < block; ++p) best[p % 4] = larger(best[p % 4], lags_[first + p] = lags_of(first + p, t));
        }
        const Pair both = larger(larger(best[0], best[1]), larger(best[2], best[3]));
        return both[0] > both[1] ? both[0] : both[1];
    }

    Pair lags_of(size_t pair, double t) const {
        Pair c[Share::size];
        for (size_t k = 0; k < Share::size; ++k) c[k] = coefficients_[k][pair];
        return Share::at(c, t) - counts_[pair];
    }

    static Pair larger(Pair a, Pair b) { return a > b ? a : b; }

    // Of the active groups with that lag the one whose turn has the lowest number. Without branches up to the rare tie.
    size_t place_of(double lag) const {
        size_t best = num_active_;
        for (size_t first = 0; first < num_blocks() * block; first += block) {
            uint64_t found = 0;
            for (size_t p = 0; p < block; ++p) found |= equal_bits(lags_[first + p], lag) << 2 * p;
            for (; found; found &= found - 1) {
                const size_t at = 2 * first + static_cast<size_t>(__builtin_ctzll(found));
                if (best == num_active_ || turn(at) < turn(best)) best = at;
            }
        }
        return best;
    }

    int32_t turn(size_t at) const { return members_[groups_[active_[at]].cursor]; }

    // lag: before the draw that ended the round.
    void finish_round(size_t at, Group& group, double lag, int64_t step) {
        group.cursor = group.begin;
        ++group.round;
        if (group.round == group.limit) {
            group.due = spent;
            return deactivate(at);
        }
        put(counts_, at, static_cast<double>(group.round));
        const int64_t due = due_step(group, lag - 1, step);
        if (due > step + 1) {
            wait(active_[at], due, step);
            deactivate(at);
        }
    }

    // --- the calendar

    // No earlier than this step does a group that has this lag now reach the floor; at most `step` when it may be there already.
    int64_t due_step(const Group& group, double lag, int64_t step) const {
        const double gap = floor_ - lag - slack_;
        if (!(gap > 0)) return step;
        const double steps = gap * group.inverse_rate;
        return steps < 1e18 ? step + static_cast<int64_t>(steps) : unlimited;
    }

    void wait(int32_t group, int64_t due, int64_t step) {
        groups_[group].due = due;
        const int64_t num_days = static_cast<int64_t>(days_.size());
        const int64_t day = std::min(due, step + num_days - 1);  // what lies beyond the calendar is looked at again at its end
        int32_t& list = days_[day & (num_days - 1)];
        groups_[group].next = list;
        list = group;
    }

    void arrive(int64_t step) {
        int32_t& list = days_[step & static_cast<int64_t>(days_.size() - 1)];
        int32_t group = list;
        list = -1;
        while (group >= 0) {
            const int32_t next = groups_[group].next;
            if (groups_[group].due <= step) {
                activate(group);
            } else {
                wait(group, groups_[group].due, step);
            }
            group = next;
        }
    }

    // --- the floor

    // A floor is kept for so long, or moved so far, that looking at all groups costs little per step.
    bool change_floor(int64_t step, double t, double greatest) {
        const int64_t age = step - last_reset_, num_groups = static_cast<int64_t>(groups_.size());
        if (greatest >= floor_ && age < num_groups) return false;  // too many are active, but it was changed just now
        if (greatest < floor_ && age < num_groups / 4) window_ *= 2;
        if (age > 4 * num_groups) window_ = std::max(0.75 * window_, 5.0 / static_cast<double>(num_groups));
        reset(step, t);
        return true;
    }

    void reset(int64_t step, double t) {
        is_fresh_ = false;
        last_reset_ = step;
        std::fill(days_.begin(), days_.end(), -1);
        std::fill(counts_.begin(), counts_.end(), Pair{infinity, infinity});
        num_active_ = 0;
        double greatest = -infinity;
        for (const Group& group : groups_) {
            if (group.due != spent) greatest = std::max(greatest, lag_of(group, t));
        }
        floor_ = groups_.size() <= some ? -infinity : greatest - window_;
        for (size_t g = 0; g < groups_.size(); ++g) {
            if (groups_[g].due == spent) continue;
            const int64_t due = due_step(groups_[g], lag_of(groups_[g], t), step);
            if (due <= step) {
                activate(static_cast<int32_t>(g));
            } else {
                wait(static_cast<int32_t>(g), due, step);
            }
        }
        max_active_ = groups_.size() <= some ? some : 2 * block + static_cast<size_t>(window_ * static_cast<double>(groups_.size()));
    }

    static constexpr int64_t spent = -1;

    std::vector<Group> groups_;
    std::vector<int32_t> members_;  // numbers of the sources, group after group
    size_t num_active_ = 0, max_active_ = 0;
    std::vector<int32_t> active_;  // their groups
    std::array<std::vector<Pair>, Share::size> coefficients_;
    std::vector<Pair> counts_, lags_;
    std::vector<int32_t> days_;  // step modulo its size -> first group that waits for it
    double floor_ = -infinity, window_ = 0, slack_ = 0;
    int64_t last_reset_;
    bool is_fresh_ = true;
};

}  // namespace trireme
