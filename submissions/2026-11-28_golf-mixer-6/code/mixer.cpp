// golf's context mixer: predicts the next token of each lane from all text shown so far, one bit at a time.
//
// Tokens are leaves of a binary tree, sorted by their text, so that one node's leaves share a prefix. A token is coded
// by the bits on the path from the root to it. The probability of a bit comes, as in paq8, lpaq and cmix (Mahoney, Data
// Compression Explained, 4.3; Knoll and de Freitas, arXiv:1108.3298), from
//   1. contexts: each hashes something about the past; it keeps an adaptive probability and a short history of the bits
//      seen at each node, and a map learns which probability such a history deserves;
//   2. two match models: the token that followed the last repetition of 7 tokens, and of 3;
//   3. the network: its probabilities and each token's share of the text, summed over both subtrees, those of the
//      document's own tokens raised before.
// Logistic mixing (Mahoney 4.3.2) adds these up: the weights are the sum of one vector for the node, one for each of
// the last two tokens, one for the contexts that know the node and one for the length of the match. All of it learns
// from each token once that has been shown. Arithmetic is plain IEEE without contraction, logarithm and exponential are
// this file's own: so machines agree on each bit, and one can decode the text that another one coded.

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

using std::uint16_t, std::uint32_t, std::uint64_t, std::uint8_t, std::vector;

// ---------------------------------------------------------------------------------------------------- arithmetic

constexpr float LN2 = 0.693147180559945f;

float natural_log(float x) {  // of positive normal numbers: exponent, and the series of 2 artanh of the mantissa
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    int exponent = int(bits >> 23) - 127;
    bits = (bits & 0x7FFFFF) | 0x3F800000;
    std::memcpy(&x, &bits, 4);  // 1 <= x < 2
    if (x > 1.41421356f) x *= 0.5f, exponent++;
    const float z = (x - 1) / (x + 1), q = z * z;
    return exponent * LN2 + 2 * z * (1 + q * (1 / 3.f + q / 5.f));
}

float exponential(float x) {  // of -80 to 80
    const int exponent = int(x / LN2 + (x < 0 ? -0.5f : 0.5f));
    const float r = x - exponent * LN2;
    const float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720.f)))));
    const uint32_t bits = uint32_t(exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return series * power;
}

float clamp(float x, float low, float high) { return std::max(low, std::min(high, x)); }
float squash(float x) { return 1 / (1 + exponential(-x)); }
float stretch(float p) { return natural_log(p / (1 - p)); }  // the inverse of squash

// Tables of both, and of the rates by count, for speed.
constexpr int STEPS = 4096;
struct Tables {
    float stretch_of[STEPS], squash_of[STEPS + 1], rate_of[256];
    Tables() {
        for (int i = 0; i < STEPS; i++) stretch_of[i] = stretch((i + 0.5f) / STEPS);
        for (int i = 0; i <= STEPS; i++) squash_of[i] = squash(i * (24.f / (STEPS - 1)) - 12);
        for (int i = 0; i < 256; i++) rate_of[i] = 1 / (i + 1.3f);
    }
};
const Tables TABLES;
float squash_at(float x) {  // of -12 to 12
    const float place = (x + 12) * ((STEPS - 1) / 24.f);
    const int i = int(place);
    return TABLES.squash_of[i] + (place - i) * (TABLES.squash_of[i + 1] - TABLES.squash_of[i]);
}

uint64_t hash(uint64_t a, uint64_t b) {
    uint64_t h = (a ^ (b * 0x9E3779B97F4A7C15)) * 0xD6E8FEB86659FD93;
    h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93;
    return h ^ (h >> 29);
}

// -------------------------------------------------------------------------------------------------------- lanes

constexpr int REPEATED[2] = {7, 3};
struct Match {  // a place in some lane's text whose last tokens are those of this lane
    uint64_t place = 0;  // lane + 1 and position of the token expected next; 0: none
    int length = 0;      // how many tokens agree; fewer than REPEATED after a token that did not
    int missed = 0;      // how many did not, since more than 16 in a row did
    int leaf = -1;       // of the expected token
    static constexpr int SIZES = 32;  // classes of lengths
    int size() const { return length < 16 ? length : std::min(12 + length / 4, SIZES - 1); }
};
constexpr int MISSES = 8;  // a match that has missed more ends

struct Lane {
    vector<uint16_t> text;
    uint64_t document = 0;      // its number, hashed
    uint64_t word = 0;          // hash of the word that has begun and the character before it; between words that one
    uint64_t word_before = 0;   // hash of the last whole one
    vector<uint64_t> contexts;  // hashes
    vector<float> mass;         // what network and shares give each node's leaves, not normalised; leaves come last
    vector<float> raised;       // by how much it is multiplied at each leaf
    Match matches[2];           // after repetitions of REPEATED tokens

    uint64_t back(size_t n) const { return n <= text.size() ? text[text.size() - n] + 1u : 0; }
    uint64_t order(int n) const {
        uint64_t h = 0;
        for (int i = 1; i <= n; i++) h = hash(h + i, back(i));
        return h;
    }
};

// All contexts: a name for the switch, and what is hashed. "document" contexts know this document alone (a cache).
struct Context {
    const char* name;
    uint64_t (*of)(const Lane&);
    int halved = 0;  // how many times its table is halved: it takes few values, or few at a time
};

const Context CONTEXTS[] = {
    {"order 0", [](const Lane&) { return uint64_t(0); }, 13},
    {"order 1", [](const Lane& l) { return l.order(1); }, 4},
    {"order 2", [](const Lane& l) { return l.order(2); }},
    {"order 3", [](const Lane& l) { return l.order(3); }},
    {"order 5", [](const Lane& l) { return l.order(5); }},
    {"word", [](const Lane& l) { return l.word; }, 3},
    {"word and 1 before", [](const Lane& l) { return hash(l.word, l.word_before); }},
    {"document", [](const Lane& l) { return l.document; }, 4},
    {"document, order 1", [](const Lane& l) { return hash(l.document, l.order(1)); }, 2},
    {"document, order 2", [](const Lane& l) { return hash(l.document, l.order(2)); }, 2},
    {"document, word", [](const Lane& l) { return hash(l.document, l.word); }, 2},
};
constexpr int C = sizeof CONTEXTS / sizeof *CONTEXTS;

// A token that came n times in a document becomes 1 + n / (RARE * its share of all text) times as likely to the network
// (as in dynamic marginals: Kneser, Peters and Klakow, Eurospeech 1997). This alone reaches the subtrees below the
// threshold, too.
constexpr float RARE = 2000;

// The share of each token in the text so far is added to the network's probabilities, with a weight that is learned: it
// stays near 0 on text like the training text, which the network knows, and nears one half on text of another kind.
constexpr float START_SHARES = 0.05f, RATE_SHARES = 0.001f;
constexpr float FORGET = 0.1f;  // of the shares, what the training text counts for

// ----------------------------------------------------------------------------------------------- what is learned

struct Slot {  // what one context knows of one node
    uint16_t p = 1 << 15;  // probability of a 1, of 2^16
    uint8_t n = 0;         // how many bits it has seen, up to LIMIT
    uint8_t history = 1;   // the first 7 of these bits behind a leading 1
};
constexpr int LIMIT = 250;
constexpr int DEPTH = 4;  // levels of the tree in one bucket: its nodes lie in one cache line

struct alignas(64) Bucket {
    uint32_t check;  // 0: free
    Slot slots[(1 << DEPTH) - 1];
};

constexpr int POPULATE_WRITE = 23;  // of madvise, from Linux 5.14 on; older headers lack its name

class Table {  // hashed buckets of one context; the less used of two gives way
    Bucket* buckets = nullptr;
    size_t bytes = 0;
    uint32_t mask = 0;
    Bucket* at(uint64_t h, int i) const { return &buckets[((h >> 32) & mask) ^ i]; }

  public:
    void open(int bits) {
        bytes = sizeof(Bucket) << bits, mask = (1u << bits) - 1;
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        buckets = (Bucket*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (buckets == MAP_FAILED) throw std::bad_alloc();
        madvise(buckets, bytes, MADV_HUGEPAGE);
        madvise(buckets, bytes, POPULATE_WRITE);  // before anything is timed: it can take seconds
    }
    ~Table() { munmap(buckets, bytes); }
    void prefetch(uint64_t h) const { __builtin_prefetch(at(h, 0)); }
    Bucket* find(uint64_t h, Bucket* otherwise) const {
        for (int i = 0; i < 2; i++)
            if (at(h, i)->check == (uint32_t(h) | 1)) return at(h, i);
        return otherwise;
    }
    Bucket* find_or_make(uint64_t h) {
        if (Bucket* found = find(h, nullptr)) return found;
        Bucket *a = at(h, 0), *b = at(h, 1);
        Bucket* bucket = !a->check || (b->check && a->slots[0].n <= b->slots[0].n) ? a : b;
        Bucket* other = bucket == a ? b : a;
        if (bucket->check && other->slots[0].n > 1) other->slots[0].n--;  // nothing stays for ever
        bucket->check = uint32_t(h) | 1;
        std::fill(std::begin(bucket->slots), std::end(bucket->slots), Slot());
        return bucket;
    }
};

struct Estimate {  // an adaptive probability
    float p;
    int n = 0;
    explicit Estimate(float p = 0.5f) : p(p) {}
    float stretched() const { return TABLES.stretch_of[int(p * STEPS)]; }
    void learn(bool bit) {
        n = std::min(n + 1, LIMIT);
        p = clamp(p + (bit - p) * TABLES.rate_of[n], 0.0005f, 0.9998f);
    }
};

// The history of a slot as a number: the bits themselves while there are few, else count and probability.
constexpr int EXACT = 128, STATES = EXACT + 7 * 32;

typedef float Vec __attribute__((vector_size(64)));  // the order of its sums is fixed, whatever the machine
constexpr int VECS = 2;

struct Vector {
    Vec v[VECS];
    float& operator[](int i) { return ((float*)v)[i]; }
    float dot(const Vector& other) const {
        Vec sum = v[0] * other.v[0];
        for (int i = 1; i < VECS; i++) sum += v[i] * other.v[i];
        float half[16];
        std::memcpy(half, &sum, sizeof half);
        for (int width = 8; width; width /= 2)
            for (int i = 0; i < width; i++) half[i] += half[i + width];
        return half[0];
    }
    void add(const Vector& other, float scale) {
        for (int i = 0; i < VECS; i++) v[i] += scale * other.v[i];
    }
};

// The inputs of the mixing: of each context the probability, from HISTORY on what its history deserves, and these. What
// would be the weight of LEARNED, which is always 0, counts how often the vector has learned.
enum Input { NETWORK = C, MATCH, HISTORY = 16, BIAS = HISTORY + C, LEARNED };
static_assert(MATCH + 1 < HISTORY && LEARNED < 2 * HISTORY);
constexpr int LEVELS = 16;  // of a tree of at most 2^16 leaves
constexpr int SETS = 5;  // of weights; the sum of one vector of each is used
constexpr float START_DIRECT = 0.05f / SETS, START_HISTORY = 0.1f / SETS, START_MATCH = 0.15f / SETS;
constexpr float START_NETWORK = 0.4f / SETS, OTHERS = 0.8f;  // what the rest is multiplied by when that joins

// ------------------------------------------------------------------------------------------ arithmetic coding

struct Encoder {  // carryless, 32 bits, as in lpaq
    uint32_t low = 0, high = ~0u;
    vector<uint8_t> bytes;
    void code(bool bit, float p1) {
        const uint32_t middle = low + uint32_t((uint64_t(high - low) * uint32_t(p1 * 65536)) >> 16);
        bit ? high = middle : low = middle + 1;
        for (; !((low ^ high) >> 24); low <<= 8, high = high << 8 | 255) bytes.push_back(high >> 24);
    }
    void flush() {
        for (int i = 0; i < 4; i++, low <<= 8) bytes.push_back(low >> 24);
    }
};

struct Decoder {
    const uint8_t *at, *end;
    uint32_t low = 0, high = ~0u, code = 0;
    Decoder(const uint8_t* at, size_t size) : at(at), end(at + size) {
        for (int i = 0; i < 4; i++) code = code << 8 | next();
    }
    uint8_t next() { return at < end ? *at++ : 0; }
    bool decode(float p1) {
        const uint32_t middle = low + uint32_t((uint64_t(high - low) * uint32_t(p1 * 65536)) >> 16);
        const bool bit = code <= middle;
        bit ? high = middle : low = middle + 1;
        for (; !((low ^ high) >> 24); low <<= 8, high = high << 8 | 255) code = code << 8 | next();
        return bit;
    }
};

// -------------------------------------------------------------------------------------------------------- mixer

struct Node {  // what a prediction at one node was made of
    Vector inputs;
    Slot* slots[C];
    Estimate* histories[C];
    Estimate* matched[2];  // null: the match says nothing
    bool expected[2];      // the bits that matches expect
    Vector* weights[SETS];
    float p;
};

class Mixer {
    const int tokens, depth, leaves, bos;
    const uint64_t off;          // bit i: context i is switched off
    vector<int> leaf_of, token_at;
    vector<std::string> pieces;  // each token's text
    vector<Lane> lanes;          // the last one is the training text's
    std::optional<Decoder> decoder;  // of the training text, once that has begun
    Table tables[C];
    Bucket nothing{};            // stands for buckets that are missing: no slot has seen a bit
    vector<Estimate> histories, matches[2];
    vector<Vector> weights[SETS];
    vector<float> shown;  // 0.5 + how often each leaf was shown
    double total_shown;   // their sum over tokens
    float share_weight = START_SHARES;  // of `shown` beside the network
    static constexpr int PLACE_BITS = 22;
    vector<uint64_t> places[2];  // after the last occurrence of REPEATED tokens, by hash
    std::atomic<bool> enough = false;

  public:
    Mixer(int tokens, int lanes, const int* leaf, const char* const* texts, const int* lengths, int bos, int bits,
          uint64_t off)
        : tokens(tokens), depth(32 - __builtin_clz(tokens - 1)), leaves(1 << depth), bos(bos), off(off),
          leaf_of(leaf, leaf + tokens), token_at(leaves, -1), lanes(lanes + 1), histories(C * depth * STATES),
          shown(leaves, 0.5f), total_shown(0.5 * tokens) {
        for (int i = 0; i < tokens; i++) token_at[leaf_of[i]] = i, pieces.emplace_back(texts[i], lengths[i]);
        for (Lane& lane : this->lanes)
            lane.contexts.resize(C), lane.mass.assign(2 * leaves, 1), lane.raised.assign(leaves, 1);
        for (int i = 0; i < C; i++) tables[i].open(off >> i & 1 ? 1 : std::max(1, bits - CONTEXTS[i].halved));
        for (size_t i = 0; i < histories.size(); i++) histories[i] = Estimate(expected(i % STATES));
        Vector first{};
        for (int i = 0; i < C; i++) first[i] = START_DIRECT, first[HISTORY + i] = START_HISTORY;
        first[MATCH] = first[MATCH + 1] = START_MATCH, first[NETWORK] = START_NETWORK;
        for (int i = 0; i < 2; i++)
            matches[i].assign(Match::SIZES * depth, Estimate(i ? 0.7f : 0.8f)), places[i].resize(1 << PLACE_BITS);
        const int sizes[SETS] = {leaves, LEVELS * tokens, tokens + 1, 1 << C, 1 + 2 * Match::SIZES};
        for (int i = 0; i < SETS; i++) weights[i].assign(sizes[i], first);
    }

    // Code tokens of the training text until they take `limit` bytes, or another thread calls `stop`; learn from them.
    // Returns how many were coded.
    long encode(const uint16_t* text, long count, size_t limit, uint8_t* out, long* size) {
        Encoder encoder;
        Lane& lane = lanes.back();
        show(lanes.size() - 1, bos);
        long done = 0;
        for (; done < count && encoder.bytes.size() + 32 < limit && !enough; done++) {
            const int leaf = leaf_of[text[done]];
            walk(lane, [&](int level, float p) {
                const bool bit = leaf >> (depth - 1 - level) & 1;
                encoder.code(bit, p);
                return bit;
            });
            show(lanes.size() - 1, text[done]);
        }
        encoder.flush();
        std::copy(encoder.bytes.begin(), encoder.bytes.end(), out);
        *size = encoder.bytes.size();
        hear_network();
        return done;
    }

    void stop() { enough = true; }

    // Learn from the next `count` tokens that `encode` coded. After the `last` of them the lanes come.
    void decode(const uint8_t* code, size_t size, long count, bool last) {
        Lane& lane = lanes.back();
        if (!decoder) decoder.emplace(code, size), show(lanes.size() - 1, bos);
        for (long i = 0; i < count; i++) {
            const int leaf = walk(lane, [&](int, float p) { return decoder->decode(p); });
            if (token_at[leaf] < 0) break;  // not what `encode` made
            show(lanes.size() - 1, token_at[leaf]);
        }
        if (last) hear_network();
    }

    // Learn from the tokens that the lanes show.
    void learn(const int64_t* ids, const int64_t* lane, int count) {
        for (int i = 0; i < count; i++) {
            Lane& l = lanes[lane[i]];
            const int leaf = leaf_of[ids[i]];
            if (!l.text.empty()) {
                // Which part of its mass came from the shares: their weight moves towards it (an EM step).
                const float part = weight_of_shown() * shown[leaf] * l.raised[leaf] / l.mass[leaves + leaf];
                share_weight = clamp(share_weight + RATE_SHARES * (part - share_weight), 0.001f, 0.9f);
                walk(l, [&](int level, float) { return leaf >> (depth - 1 - level) & 1; });
            }
            show(lane[i], ids[i]);
        }
    }

    // Turn the network's probabilities (count, V) of the lanes' next tokens into logarithms of the mixture's. Subtrees
    // less probable than `threshold` keep the shares that network and text give them. Nothing learns meanwhile, so
    // threads change nothing. Returns how many nodes were mixed.
    long predict(const int64_t* lane, int count, float* p, float threshold, int threads) {
        std::atomic<int> next = 0;
        std::atomic<long> nodes = 0;
        auto work = [&]() {
            vector<float> mixed(leaves);
            for (int i; (i = next++) < count;)
                nodes += predict_lane(lanes[lane[i]], p + size_t(i) * tokens, threshold, mixed.data());
        };
        vector<std::thread> others;
        for (int i = 1; i < std::min(threads, count); i++) others.emplace_back(work);
        work();
        for (auto& thread : others) thread.join();
        return nodes;
    }

  private:
    static float expected(int state) {  // of a history, before anything is known of it
        if (state >= EXACT) return (state % 32 + 0.5f) / 32;
        float ones = 0.4f, all = 0.8f;
        for (; state > 1; state >>= 1) ones += state & 1, all++;
        return ones / all;
    }

    float weight_of_shown() const { return share_weight / (1 - share_weight) / float(total_shown); }

    // The training text was learned without the network (its input was 0), so its weights are still the first ones.
    // Scale down the others to make room. Of how often tokens were shown keep a part: the lanes may show other text.
    void hear_network() {
        for (float& count : shown) count = std::max(0.5f, FORGET * count);
        total_shown = std::accumulate(shown.begin(), shown.begin() + tokens, 0.0);
        for (auto& set : weights)
            for (Vector& w : set) {
                const float network = w[NETWORK], learned = w[LEARNED];
                for (Vec& part : w.v) part *= OTHERS;
                w[NETWORK] = network, w[LEARNED] = learned;
            }
    }

    // A lane shows a token: take it up into text, words, contexts and matches.
    void show(size_t number, int token) {
        Lane& lane = lanes[number];
        lane.text.push_back(token);
        if (token == bos) {
            // The training text is number 0, however many lanes there are: a decoder's hashes must not differ.
            lane.document = hash(number + 1 == lanes.size() ? 0 : number + 1, lane.text.size());
            lane.word = lane.word_before = 0;
            std::fill(lane.raised.begin(), lane.raised.end(), 1.f);
        } else {
            for (uint8_t c : pieces[token]) read(lane, c);
            const int leaf = leaf_of[token];
            lane.raised[leaf] += float(total_shown / (RARE * shown[leaf]));
            shown[leaf]++, total_shown++;
        }
        uint64_t* place[2];
        for (int i = 0; i < 2; i++)
            __builtin_prefetch(place[i] = &places[i][lane.order(REPEATED[i]) >> (64 - PLACE_BITS)]);
        for (int i = 0; i < C; i++) lane.contexts[i] = hash(CONTEXTS[i].of(lane), i + 1);
        for (int i = 0; i < 2; i++) follow(number, lane.matches[i], *place[i], REPEATED[i]);
    }

    static void read(Lane& lane, uint8_t c) {
        if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
        if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c >= 128 || c == '\'') {
            lane.word = hash(lane.word + 1, c);
            return;
        }
        if (lane.word > 255) lane.word_before = lane.word;  // it has ended
        lane.word = c;
    }

    // Move the match on by the token just shown, whether it was the expected one or not (one word of a repetition may
    // differ). Until `least` tokens agree again, look for a new match of that length.
    void follow(size_t number, Match& match, uint64_t& newest, int least) {
        const auto& text = lanes[number].text;
        const size_t n = text.size();
        auto of = [&](const Match& m) -> const vector<uint16_t>& { return lanes[(m.place >> 32) - 1].text; };
        if (match.place) {
            const bool right = match.leaf == leaf_of[text.back()];
            match.place++;
            match.length = right ? match.length + 1 : 0;
            match.missed = match.length > 16 ? 0 : match.missed + !right;
            if (match.missed > MISSES) match = Match();
        }
        if (n >= size_t(least)) {
            if (match.length < least && newest) {
                Match found;
                found.place = newest;
                const size_t at = uint32_t(found.place);
                const size_t most = std::min({at, n, size_t(32)});
                while (found.length < int(most) && of(found)[at - 1 - found.length] == text[n - 1 - found.length])
                    found.length++;
                if (found.length >= least) match = found;  // else another hash
            }
            newest = uint64_t(number + 1) << 32 | n;
        }
        if (match.place && uint32_t(match.place) < of(match).size())
            match.leaf = leaf_of[of(match)[uint32_t(match.place)]];
        else
            match = Match();
    }

    // Take the path from the root that `decide` (level, probability of a 1) chooses, learn from it, return its leaf.
    template <class Decide>
    int walk(Lane& lane, Decide decide) {
        Bucket* buckets[C];
        int node = 1;
        for (int level = 0; level < depth; level++) {
            if (level % DEPTH == 0) {
                uint64_t h[C];
                for (int i = 0; i < C; i++) tables[i].prefetch(h[i] = hash(lane.contexts[i], node));
                for (int i = 0; i < C; i++) buckets[i] = off >> i & 1 ? &nothing : tables[i].find_or_make(h[i]);
            }
            Node at;
            evaluate(lane, level, node, buckets, at);
            const bool bit = decide(level, at.p);
            update(at, bit);
            node = 2 * node + bit;
        }
        return node - leaves;
    }

    int predict_lane(Lane& lane, float* p, float threshold, float* mixed) {
        float* q = lane.mass.data();
        const float weight = weight_of_shown();
        const int* token = token_at.data();
        for (int i = 0; i < tokens; i++)
            q[leaves + i] = (std::max(p[token[i]], 1e-9f) + weight * shown[i]) * lane.raised[i];
        std::fill(q + leaves + tokens, q + 2 * leaves, 1e-12f);
        for (int width = leaves / 2; width; width /= 2) {
#pragma GCC ivdep  // what is read lies beyond what is written
            for (int i = width; i < 2 * width; i++) q[i] = q[2 * i] + q[2 * i + 1];
        }
        Bucket* none[C];
        std::fill(none, none + C, &nothing);
        const int nodes = expand(lane, 0, 1, 1, none, threshold, mixed);
        const int* leaf = leaf_of.data();
        for (int i = 0; i < tokens; i++) p[i] = std::max(mixed[leaf[i]], 1e-12f);
        for (int i = 0; i < tokens; i++) p[i] = natural_log(p[i]);
        return nodes;
    }

    // The mixture's probabilities of the leaves below a node, whose own is p. Returns how many nodes were mixed.
    int expand(const Lane& lane, int level, int node, float p, Bucket* const* above, float threshold, float* mixed) {
        if (p < threshold || level == depth) {
            const int first = node << (depth - level), last = first + (1 << (depth - level));
            const float scale = p / lane.mass[node];
            for (int i = first; i < last; i++) mixed[i - leaves] = lane.mass[i] * scale;
            return 0;
        }
        Bucket* found[C];
        if (level % DEPTH == 0) {
            uint64_t h[C];
            // A path is made from its root: what lies below a bucket that has given way is not looked for.
            auto possible = [&](int i) { return (!level || above[i] != &nothing) && !(off >> i & 1); };
            for (int i = 0; i < C; i++)
                if (possible(i)) tables[i].prefetch(h[i] = hash(lane.contexts[i], node));
            for (int i = 0; i < C; i++) found[i] = possible(i) ? tables[i].find(h[i], &nothing) : &nothing;
            above = found;
        }
        Node at;
        evaluate(lane, level, node, above, at);
        if ((level + 1) % DEPTH == 0 && level + 1 < depth && p * at.p >= threshold)
            for (int i = 0; i < C; i++)  // the right subtree's buckets arrive while the left one is visited
                if (above[i] != &nothing) tables[i].prefetch(hash(lane.contexts[i], 2 * node + 1));
        const int left = expand(lane, level + 1, 2 * node, p * (1 - at.p), above, threshold, mixed);
        return 1 + left + expand(lane, level + 1, 2 * node + 1, p * at.p, above, threshold, mixed);
    }

    // The prediction at a node.
    void evaluate(const Lane& lane, int level, int node, Bucket* const* buckets, Node& at) {
        const uint32_t been = look(level, node, buckets, at);
        at.inputs[NETWORK] = clamp(natural_log(lane.mass[2 * node + 1] / lane.mass[2 * node]), -12, 12);
        at.inputs[BIAS] = 0.3f;
        for (int i = 0; i < 2; i++)
            at.matched[i] = expect(lane.matches[i], matches[i], level, node, at.inputs[MATCH + i], at.expected[i]);
        const auto& [longer, shorter] = lane.matches;
        uint32_t match = 0;  // neither says anything
        if (at.matched[0])
            match = 1 + longer.size();
        else if (at.matched[1])
            match = 1 + Match::SIZES + shorter.size();
        const uint32_t last = lane.text.back(), before = lane.back(2);
        const uint32_t chosen[SETS] = {uint32_t(node), last * LEVELS + level, before, been, match};
        Vector sum{};
        for (int i = 0; i < SETS; i++) sum.add(*(at.weights[i] = &weights[i][chosen[i]]), 1);
        at.p = clamp(squash_at(clamp(at.inputs.dot(sum), -12, 12)), 1e-4f, 1 - 1e-4f);
        if (((2 * node + 1) << (depth - level - 1)) - leaves >= tokens) at.p = 0;  // no token there
    }

    // What the contexts know of a node, as inputs. Returns bits: which of them have been here. It has no branches, so
    // the compiler takes all contexts at once.
    uint32_t look(int level, int node, Bucket* const* buckets, Node& at) {
        const int first = 1 << level % DEPTH, slot = first - 1 + (node & (first - 1));
        uint32_t slots[HISTORY] = {};
        for (int i = 0; i < C; i++) {
            at.slots[i] = &buckets[i]->slots[slot];
            std::memcpy(&slots[i], at.slots[i], sizeof(Slot));
        }
        float *direct = &at.inputs[0], *by_history = &at.inputs[HISTORY], seen[HISTORY];
        int state[HISTORY];
        for (int i = 0; i < HISTORY; i++) {
            const int p = slots[i] & 0xFFFF, n = slots[i] >> 16 & 0xFF, history = slots[i] >> 24;
            // Of a long history only the class of its length (7) and of its probability (32) are kept.
            const int size = (n > 9) + (n > 15) + (n > 23) + (n > 39) + (n > 79) + (n > 159);
            state[i] = history < EXACT ? history : EXACT + size * 32 + (p >> 11);
            seen[i] = n ? 1 : 0;
            direct[i] = seen[i] * TABLES.stretch_of[p >> 4];
            by_history[i] = 0;
        }
        uint32_t been = 0;
        for (int i = 0; i < C; i++) {
            at.histories[i] = &histories[(i * depth + level) * STATES + state[i]];
            by_history[i] = seen[i] * at.histories[i]->stretched();
            been |= uint32_t(seen[i]) << i;
        }
        return been;
    }

    // What a match says at a node; null if the expected token is not below it.
    Estimate* expect(const Match& match, vector<Estimate>& estimates, int level, int node, float& input, bool& bit) {
        if (match.leaf < 0 || (match.leaf + leaves) >> (depth - level) != node) return nullptr;
        Estimate* estimate = &estimates[match.size() * depth + level];
        bit = match.leaf >> (depth - 1 - level) & 1;
        input = bit ? estimate->stretched() : -estimate->stretched();
        return estimate;
    }

    void update(Node& at, bool bit) {
        for (Vector* weights : at.weights) {
            const float rate = 0.0006f + 0.004f / (1 + (*weights)[LEARNED]++ / 300);
            weights->add(at.inputs, (bit - at.p) * rate);
        }
        for (int i = 0; i < 2; i++)
            if (at.matched[i]) at.matched[i]->learn(at.expected[i] == bit);
        for (int i = 0; i < C; i++) {
            if (off >> i & 1) continue;
            if (at.slots[i]->n) at.histories[i]->learn(bit);
            update(*at.slots[i], bit);
        }
    }

    static void update(Slot& slot, bool bit) {
        const float p = slot.p + ((bit ? 65535.f : 0.f) - slot.p) * TABLES.rate_of[slot.n];
        slot.p = uint16_t(clamp(p, 32, 65503));
        slot.n = std::min(slot.n + 1, LIMIT);
        if (slot.history < EXACT) slot.history = slot.history << 1 | bit;
    }
};

// ---------------------------------------------------------------------------------------------------- for ctypes

extern "C" {
int mixer_contexts() { return C; }
const char* mixer_context(int i) { return CONTEXTS[i].name; }
Mixer* mixer_new(int tokens, int lanes, const int* leaf, const char* const* texts, const int* lengths, int bos,
                 int bits, uint64_t off) {
    try {
        return new Mixer(tokens, lanes, leaf, texts, lengths, bos, bits, off);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
void mixer_free(Mixer* mixer) { delete mixer; }
long mixer_encode(Mixer* mixer, const uint16_t* text, long count, long limit, uint8_t* out, long* size) {
    return mixer->encode(text, count, limit, out, size);
}
void mixer_stop(Mixer* mixer) { mixer->stop(); }
void mixer_decode(Mixer* mixer, const uint8_t* code, long size, long count, bool last) {
    mixer->decode(code, size, count, last);
}
void mixer_learn(Mixer* mixer, const int64_t* ids, const int64_t* lane, int count) { mixer->learn(ids, lane, count); }
long mixer_predict(Mixer* mixer, const int64_t* lane, int count, float* p, float threshold, int threads) {
    return mixer->predict(lane, count, p, threshold, threads);
}
}
