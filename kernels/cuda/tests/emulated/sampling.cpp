// Choosing tokens.
#include "check.h"
#include "../../sampling.cu"

using namespace check;

std::pair<Buffer<int>, Buffer<u32>> choose(const Buffer<float>& logits, const Buffer<Sampling>& samplings) {
    int rows = samplings.size(), vocab = logits.size() / rows;
    Buffer<int> tokens(rows);
    Buffer<u32> wrong(rows);
    run("sample", rows, THREADS, 0, [&] { sample(logits.data(), samplings.data(), vocab, tokens.data(), wrong.data()); }, tokens, wrong);
    return {tokens, wrong};
}

// The engine's sampler in double precision: the token, and how close the random number came to a border.
std::pair<int, double> reference(const float* logits, int vocab, const Sampling& s) {
    struct Candidate { int token; double logit, weight; };
    std::vector<Candidate> all;
    double best = *std::max_element(logits, logits + vocab);
    for (int i = 0; i < vocab; i++) all.push_back({i, logits[i], std::exp((logits[i] - best) / s.temperature)});
    auto rank = [&] { std::stable_sort(all.begin(), all.end(), [](auto& a, auto& b) { return a.logit > b.logit; }); };
    auto total = [&] { double sum = 0; for (auto& c : all) sum += c.weight; return sum; };
    double closest = 1;
    if (s.top_k) rank(), all.resize(std::min<size_t>(all.size(), s.top_k));
    if (s.top_p < 1) {
        rank();
        double enough = s.top_p * total(), sum = 0;
        size_t kept = 0;
        while (kept < all.size() && sum < enough) {
            sum += all[kept++].weight;
            closest = std::min(closest, std::fabs(sum - enough) / enough);
        }
        all.resize(std::max<size_t>(kept, 1));
    }
    std::vector<Candidate> likely;
    for (auto& c : all) if (c.weight >= s.min_p) likely.push_back(c);
    all = likely;
    double u = (mix(mix(s.seed) + s.position) >> 11) / 9007199254740992.0, whole = total(), left = u * whole;
    for (auto& c : all) {
        left -= c.weight;
        closest = std::min(closest, std::fabs(left) / whole);
        if (left < 0) return {c.token, closest};
    }
    return {all.back().token, 0};
}

void draws_are_the_engines() {
    Random r(1);
    int compared = 0;
    for (int vocab : {3, 300, 1200}) {
        Buffer<Sampling> samplings;
        for (unsigned i = 0; i < 24; i++) {
            float top_p = i % 3 == 1 ? 0.9f : i % 7 == 3 ? 0.05f : 1.0f, min_p = i % 5 == 2 ? 0.05f : 0.0f;
            samplings.push_back({i % 2 ? 1.0f : 0.6f, top_p, min_p, i % 4 == 2 ? 5u : i % 8 == 1 ? 1u : 0u, 7 + i, i * i});
        }
        // Quarters: many equal logits.
        Buffer<float> logits;
        for (size_t i = 0; i < samplings.size() * vocab; i++) logits.push_back(std::round(r.uniform() * (i % 2 ? 20 : 12)) / 4);
        auto [tokens, wrong] = choose(logits, samplings);
        for (size_t row = 0; row < samplings.size(); row++) {
            auto [want, closest] = reference(&logits[row * vocab], vocab, samplings[row]);
            if (closest < 1e-4) continue;
            compared++;
            if (tokens[row] != want) fail("row " + std::to_string(row) + " of " + std::to_string(vocab) + ": " + std::to_string(tokens[row]) + " instead of " + std::to_string(want));
            Buffer<float> own(logits.begin() + row * vocab, logits.begin() + (row + 1) * vocab);
            if (choose(own, {samplings[row]}).first[0] != want) fail("a row alone");
        }
    }
    if (compared < 60) fail("only " + std::to_string(compared) + " rows are far enough from a border");
}

void greedy_takes_the_lowest_of_the_best() {
    Sampling greedy{0, 1, 0, 0, 0, 0};
    auto one = [&](Buffer<float> logits) { return choose(logits, {greedy}); };
    if (one({-1, 0.0f, -0.0f, 0}).first[0] != 1) fail("zeros of either sign are equal");
    if (one({-0.0f, 0.0f}).first[0] != 0) fail("the lower id");
    if (one({-INFINITY, -3, -INFINITY}).first[0] != 1) fail("one possible token");
    Buffer<float> wide(1000, 1.0f);
    wide[700] = wide[900] = 2;
    if (one(wide).first[0] != 700) fail("the best");
    auto [token, wrong] = one({1, NAN, INFINITY});
    if (token[0] != -1 || wrong[0] != 1) fail("a NaN");
    wide[999] = INFINITY;
    if (one(wide).first[0] != -1 || one(wide).second[0] != 999) fail("an infinity");
    if (one({-INFINITY, -INFINITY}).first[0] != -2) fail("nothing possible");
}

int main(int argc, char** argv) {
    return check::main(argc, argv, {
        {"draws are the engine's, filtered or not", draws_are_the_engines},
        {"greedy takes the lowest id of the best, and names what is not finite", greedy_takes_the_lowest_of_the_best},
    });
}
