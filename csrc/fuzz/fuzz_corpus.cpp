// Damages a corpus in every way that one can list, and many at random, and reads each damaged copy as training does.
//
//     fuzz_corpus PREFIX FOLDER SEED NUM_RANDOM        # tests/data/test_fuzz_corpus.py builds it with sanitizers and runs it
//
// Each sequence, each document and each gathered row must be an error that names the file, or what the sound corpus holds, or what
// `understand` below, a plain second reader that looks at the whole file, says that the damaged files hold. The last is no failing:
// the format has no checksums, so other tokens in the .bin, or a border between documents that moved within the sequences, is simply
// another corpus. Such cases are counted by their kind and printed; the test knows how many of each there may be. Anything else is
// printed and ends the program with 1. Left out: files that change while they are read.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "../corpus.hpp"
#include "../error.hpp"
#include "../gather.hpp"

using namespace trireme;
using Bytes = std::vector<char>;
using Ids = std::vector<int64_t>;

namespace {

constexpr int64_t kSeqLen = 16;

struct Files {
    Bytes idx, bin;
};

struct Content {
    std::vector<Ids> sequences;
    std::vector<std::pair<int64_t, int64_t>> documents;
    bool operator==(const Content& other) const { return sequences == other.sequences && documents == other.documents; }
};

template <class T>
T at(const Bytes& bytes, size_t place) {
    T value;
    std::memcpy(&value, bytes.data() + place, sizeof(T));
    return value;
}

int64_t token_at(const Bytes& bin, int code, size_t place) {
    switch (code) {
        case 1: return at<uint8_t>(bin, place);
        case 2: return at<int8_t>(bin, place);
        case 3: return at<int16_t>(bin, place);
        case 4: return at<int32_t>(bin, place);
        case 5: return at<int64_t>(bin, place);
        default: return at<uint16_t>(bin, place);
    }
}

// The format as facts about bytes, without any cleverness: nothing unless all of it is consistent.
std::optional<Content> understand(const Files& files) {
    const Bytes& idx = files.idx;
    if (idx.size() < 34 || std::memcmp(idx.data(), "MMIDIDX\0\0", 9) != 0 || at<uint64_t>(idx, 9) != 1) return {};
    const int code = at<uint8_t>(idx, 17);
    const std::map<int, size_t> sizes{{1, 1}, {2, 1}, {3, 2}, {4, 4}, {5, 8}, {8, 2}};
    if (!sizes.count(code)) return {};
    const size_t itemsize = sizes.at(code);
    const auto num_sequences = at<uint64_t>(idx, 18), num_entries = at<uint64_t>(idx, 26);
    if (num_sequences < 1 || num_sequences > idx.size() || num_entries < 2 || num_entries > idx.size()) return {};
    if (idx.size() != 34 + 12 * num_sequences + 8 * num_entries) return {};
    Content content;
    size_t place = 0;
    for (uint64_t i = 0; i < num_sequences; ++i) {
        const auto length = at<int32_t>(idx, 34 + 4 * i);
        if (length < 0 || at<uint64_t>(idx, 34 + 4 * num_sequences + 8 * i) != place || length * itemsize > files.bin.size() - place) return {};
        Ids ids;
        for (int32_t t = 0; t < length; ++t, place += itemsize) ids.push_back(token_at(files.bin, code, place));
        content.sequences.push_back(ids);
    }
    if (place != files.bin.size()) return {};
    const auto entry = [&](uint64_t i) { return at<int64_t>(idx, 34 + 12 * num_sequences + 8 * i); };
    if (entry(0) != 0 || entry(num_entries - 1) != static_cast<int64_t>(num_sequences)) return {};
    for (uint64_t i = 0; i + 1 < num_entries; ++i) {
        if (entry(i) > entry(i + 1)) return {};
        content.documents.push_back({entry(i), entry(i + 1)});
    }
    return content;
}

// The sample index of a corpus whose documents are taken in order: what a cache built before the damage holds.
struct Samples {
    std::vector<int32_t> documents;
    std::vector<int32_t> starts{0, 0};
    std::vector<int64_t> rows;
    explicit Samples(const Content& content) : documents(content.sequences.size()) {
        std::iota(documents.begin(), documents.end(), 0);
        int32_t position = 0, offset = 0;
        for (;;) {
            int64_t missing = kSeqLen;
            while (missing > 0 && position < static_cast<int32_t>(documents.size())) {
                const auto left = static_cast<int64_t>(content.sequences[position].size()) - offset;
                if (left > missing) {
                    offset += static_cast<int32_t>(missing);
                    missing = 0;
                } else {
                    missing -= left;
                    ++position;
                    offset = 0;
                }
            }
            while (position < static_cast<int32_t>(documents.size()) && content.sequences[position].empty()) ++position;
            if (position == static_cast<int32_t>(documents.size())) break;
            starts.push_back(position);
            starts.push_back(offset);
        }
        rows.resize(starts.size() / 2 - 1);
        std::iota(rows.begin(), rows.end(), int64_t{0});
    }
    SampleTable<int32_t> table() const {
        return {documents.data(), static_cast<int64_t>(documents.size()), starts.data(), static_cast<int64_t>(rows.size()), kSeqLen};
    }
};

Ids row_of(const Content& content, const Samples& samples, size_t row) {
    Ids ids;
    auto position = static_cast<size_t>(samples.starts[2 * row]);
    size_t offset = samples.starts[2 * row + 1];
    for (; ids.size() < kSeqLen + 1 && position < content.sequences.size(); ++position, offset = 0) {
        const Ids& sequence = content.sequences[position];
        for (; offset < sequence.size() && ids.size() < kSeqLen + 1; ++offset) ids.push_back(sequence[offset]);
    }
    return ids;
}

Ids tokens_of(const Corpus& corpus, int64_t i) {
    const auto sequence = corpus.sequence(i);
    Bytes bytes(sequence.length * corpus.itemsize());
    if (corpus.is_mapped()) {
        if (!bytes.empty()) std::memcpy(bytes.data(), corpus.mapped(sequence.offset), bytes.size());
    } else {
        corpus.read(sequence.offset, bytes.size(), bytes.data());
    }
    Ids ids;
    for (size_t place = 0; place < bytes.size(); place += corpus.itemsize()) {
        ids.push_back(token_at(bytes, static_cast<int>(corpus.dtype()), place));
        if (ids.back() < 0) corpus.refuse_negative();
    }
    return ids;
}

class Judge {
  public:
    Judge(const Files& sound, std::string prefix) : prefix_(std::move(prefix)), sound_(*understand(sound)), samples_(sound_) {}

    // kind: what was damaged, as the counts name it.
    void look(const std::string& kind, const Files& damaged) {
        store(prefix_ + ".idx", damaged.idx, on_disk_.idx);
        store(prefix_ + ".bin", damaged.bin, on_disk_.bin);
        kind_ = kind;
        other_ = understand(damaged);
        is_error_ = is_other_ = false;
        for (Storage storage : {Storage::mmap, Storage::pread}) {
            attempt([&] { read_all(Corpus(prefix_, storage)); });
        }
        if (other_ && is_error_ && *other_ == sound_) fail("refused", "a corpus that holds what it should");
        ++counts_[kind_ + (is_other_ ? ": another corpus" : is_error_ ? ": error" : ": unharmed")];
    }

    int report() const {
        for (const auto& [kind, count] : counts_) std::printf("%s\t%ld\n", kind.c_str(), count);
        return num_failures_ > 0;
    }

  private:
    static void store(const std::string& path, const Bytes& bytes, Bytes& on_disk) {
        if (bytes == on_disk && !bytes.empty()) return;
        std::ofstream(path, std::ios::binary).write(bytes.data(), bytes.size());
        on_disk = bytes;
    }

    // Each access on its own, before anything looks at a whole array; then the whole arrays.
    void read_all(const Corpus& corpus) {
        for (int64_t i = 0; i < corpus.num_sequences(); ++i) {
            attempt([&] { compare("sequence", i, sound_.sequences, other_ ? &other_->sequences : nullptr, tokens_of(corpus, i)); });
        }
        for (int64_t i = 0; i + 1 < corpus.num_document_entries(); ++i) {
            attempt([&] {
                const auto document = corpus.document(i);
                compare("document", i, sound_.documents, other_ ? &other_->documents : nullptr, {document.first, document.end});
            });
        }
        for (size_t i = 0; i < samples_.rows.size(); i += 3) attempt([&] { gather_row(corpus, i); });
        attempt([&] {
            corpus.verify_lengths();
            corpus.verify_documents();
            corpus.max_token();
            if (!other_) whole_is_sound(corpus);
        });
    }

    // All arrays passed: then nothing but the sign of a token may be wrong.
    void whole_is_sound(const Corpus& corpus) {
        for (int64_t i = 0; i < corpus.num_sequences(); ++i) tokens_of(corpus, i);
        fail("verify", "accepts what is not consistent");
    }

    void gather_row(const Corpus& corpus, size_t i) {
        Ids tokens(kSeqLen + 1);
        gather(corpus, samples_.table(), &samples_.rows[i], 1, {tokens.data(), nullptr, nullptr}, 1);
        if (tokens == row_of(sound_, samples_, i)) return;
        if (*std::min_element(tokens.begin(), tokens.end()) < 0) return fail("row", std::to_string(i) + " holds a negative id");
        if (!other_ || tokens != row_of(*other_, samples_, i)) return fail("row", std::to_string(i) + " holds other tokens");
        is_other_ = true;
    }

    template <class T>
    void compare(const char* what, int64_t i, const std::vector<T>& sound, const std::vector<T>* other, const T& found) {
        const auto number = static_cast<size_t>(i);
        if (number < sound.size() && found == sound[number]) return;
        if (other == nullptr || number >= other->size() || found != (*other)[number]) return fail(what, std::to_string(i) + " is another one");
        is_other_ = true;
    }

    void attempt(const std::function<void()>& read) {
        try {
            read();
        } catch (const DataError& error) {
            is_error_ = true;
            const std::string text = error.what();
            // "PATH.idx: FIELD is VALUE, expected ...", or the sample index that does not fit.
            const bool names_file = text.rfind(prefix_, 0) == 0;
            const bool names_field = text.find(", expected ") != std::string::npos || text.find("the sample index does not fit") != std::string::npos;
            if (!names_file || !names_field) fail("error without file or field", text);
        }
    }

    void fail(const std::string& what, const std::string& detail) {
        if (++num_failures_ <= 20) std::printf("FAILED\t%s: %s %s\n", kind_.c_str(), what.c_str(), detail.c_str());
    }

    std::string prefix_, kind_;
    Files on_disk_;
    Content sound_;
    Samples samples_;
    std::optional<Content> other_;
    bool is_error_ = false, is_other_ = false;
    std::map<std::string, long> counts_;
    int num_failures_ = 0;
};

Bytes read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(file), {});
}

template <class T>
void put(Bytes& bytes, size_t place, T value) {
    std::memcpy(bytes.data() + place, &value, sizeof(T));
}

// Every value of the dtype code, and of each other byte of the header every single bit, its neighbours and its extremes.
void damage_header(Judge& judge, const Files& sound) {
    const auto name = [](size_t place) { return place < 9 ? "magic" : place < 17 ? "version" : place < 18 ? "dtype code" : place < 26 ? "sequence count" : "document count"; };
    for (size_t place = 0; place < 34; ++place) {
        const int now = static_cast<unsigned char>(sound.idx[place]);
        for (int value = 0; value < 256; ++value) {
            const int flipped = value ^ now;
            const bool is_tried = place == 17 || (flipped & (flipped - 1)) == 0 || std::abs(value - now) == 1 || value == 0 || value == 255;
            if (value == now || !is_tried) continue;
            Files damaged = sound;
            damaged.idx[place] = static_cast<char>(value);
            judge.look(name(place), damaged);
        }
    }
}

// Each entry of one array gets values that are wrong, nearly right, extreme, and those of its neighbours.
template <class T>
void damage_array(Judge& judge, const Files& sound, const char* name, size_t begin, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        const size_t place = begin + i * sizeof(T);
        const T now = at<T>(sound.idx, place);
        std::vector<T> values{0, 1, -1, T(now + 1), T(now - 1), T(now + 8), T(now - 8), std::numeric_limits<T>::max(), std::numeric_limits<T>::min(), T(~now)};
        if (i > 0) values.push_back(at<T>(sound.idx, place - sizeof(T)));
        for (T value : values) {
            Files damaged = sound;
            put(damaged.idx, place, value);
            if (value != now) judge.look(name, damaged);
        }
        for (size_t j = 0; j < i; ++j) {  // two entries change places
            Files damaged = sound;
            const T there = at<T>(sound.idx, begin + j * sizeof(T));
            put(damaged.idx, place, there);
            put(damaged.idx, begin + j * sizeof(T), now);
            if (there != now) judge.look(std::string(name) + " swapped", damaged);
        }
    }
}

void cut(Judge& judge, const Files& sound) {
    for (size_t step = 0; step < sound.idx.size(); step += 8) {
        Files damaged = sound;
        damaged.idx.resize(step);
        judge.look("idx cut", damaged);
        damaged.idx = sound.idx;
        damaged.idx.insert(damaged.idx.end(), step + 1, 0);
        judge.look("idx longer", damaged);
    }
    for (size_t step = 0; step < sound.bin.size(); step += 8) {
        Files damaged = sound;
        damaged.bin.resize(step);
        judge.look("bin cut", damaged);
        damaged.bin = sound.bin;
        damaged.bin.insert(damaged.bin.end(), step + 1, 0);
        judge.look("bin longer", damaged);
    }
}

// One to four changes of a kind that disks, copies and editors make.
void damage_at_random(Judge& judge, const Files& sound, std::mt19937_64& random, long count) {
    const auto below = [&](size_t limit) { return static_cast<size_t>(random() % limit); };
    for (long n = 0; n < count; ++n) {
        Files damaged = sound;
        const bool is_bin = below(8) == 0;
        Bytes& bytes = is_bin ? damaged.bin : damaged.idx;
        for (size_t change = below(4) + 1; change > 0; --change) {
            const size_t place = below(bytes.size() - 64), other = below(bytes.size() - 64), length = below(64) + 1;
            switch (below(7)) {
                case 0: bytes[place] ^= static_cast<char>(1 << below(8)); break;
                case 1: bytes[place] = static_cast<char>(random()); break;
                case 2: put<uint64_t>(bytes, place, random() >> below(64)); break;
                case 3: std::memmove(bytes.data() + place, sound.idx.data() + below(sound.idx.size() - 64), length); break;
                case 4: if (place + length <= other || other + length <= place) std::swap_ranges(bytes.begin() + place, bytes.begin() + place + length, bytes.begin() + other); break;
                case 5: bytes.erase(bytes.begin() + place, bytes.begin() + place + std::min(length, bytes.size() - 65 - place + 1)); break;
                default: bytes.insert(bytes.begin() + place, length, static_cast<char>(random())); break;
            }
            if (bytes.size() < 200) break;
        }
        judge.look(is_bin ? "random bin" : "random idx", damaged);
    }
}

// A border that moves in every field that knows of it: consistent, so that no reader can tell, unless a length falls below zero.
void move_borders(Judge& judge, const Files& sound, size_t num_sequences, int64_t itemsize) {
    for (size_t i = 0; i + 1 < num_sequences; ++i) {
        const auto length = at<int32_t>(sound.idx, 34 + 4 * i);
        for (int32_t change : {1, length + 1}) {
            Files damaged = sound;
            put<int32_t>(damaged.idx, 34 + 4 * i, length - change);
            put<int32_t>(damaged.idx, 34 + 4 * (i + 1), at<int32_t>(sound.idx, 34 + 4 * (i + 1)) + change);
            const size_t pointer = 34 + 4 * num_sequences + 8 * (i + 1);
            put<int64_t>(damaged.idx, pointer, at<int64_t>(sound.idx, pointer) - change * itemsize);
            judge.look(change <= length ? "border moved everywhere" : "border moved below zero", damaged);
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) return std::fprintf(stderr, "usage: fuzz_corpus PREFIX FOLDER SEED NUM_RANDOM\n"), 2;
    const std::string prefix = argv[1];
    const Files sound{read_file(prefix + ".idx"), read_file(prefix + ".bin")};
    const auto num_sequences = at<uint64_t>(sound.idx, 18), num_entries = at<uint64_t>(sound.idx, 26);
    Judge judge(sound, std::string(argv[2]) + "/damaged");
    judge.look("sound", sound);
    std::mt19937_64 random(std::stoull(argv[3]));
    const long num_random = std::stol(argv[4]);
    if (num_sequences <= 64) {
        damage_header(judge, sound);
        damage_array<int32_t>(judge, sound, "length", 34, num_sequences);
        damage_array<int64_t>(judge, sound, "byte offset", 34 + 4 * num_sequences, num_sequences);
        damage_array<int64_t>(judge, sound, "document entry", 34 + 12 * num_sequences, num_entries);
        cut(judge, sound);
        move_borders(judge, sound, num_sequences, Corpus(prefix).itemsize());
    }
    damage_at_random(judge, sound, random, num_random);
    return judge.report();
}
