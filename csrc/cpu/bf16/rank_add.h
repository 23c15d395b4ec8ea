// What rank_add does before and after the products of a bfloat16 unit: it rounds the factors, leaves out what is
// dropped, adds what is given, and writes.
#pragma once

#include "cpu/bf16/vectors.h"

#ifdef ALIGN_BF16_UNITS

#include <algorithm>
#include <vector>

namespace align::cpu {

// Makes the left tiles of scale * g, [kRowBlock][rank padded to 32].
BF16_INLINE void round_factors(const RankTerm<float>& term, int64_t count, bfloat16* factors) {
  for (int64_t t = 0; t < kRowBlock; ++t) {
    for (int64_t j = 0; j < term.rank; j += kTileLine, factors += kTileLine) {
      const __mmask32 lanes = t < count ? first_lanes(term.rank - j) : 0;
      _mm512_storeu_si512(factors, rounded_line(term.g.row(t) + j, lanes, term.scale));
    }
  }
}
BF16_INLINE void round_all_factors(const RankAdd<bfloat16>& op) {
  bfloat16* factors = op.factors;
  for (int64_t k = 0; k < op.count; ++k) {
    round_factors(op.terms[k], op.rows.count, factors);
    factors += factor_tiles(op.terms[k].rank);
  }
}

constexpr int64_t kAddColumns = 64;  // columns of a piece of the result

struct Pair {  // 32 columns
  __m512 low, high;
};
BF16_INLINE Pair load_sums(const float* sums) { return {_mm512_load_ps(sums), _mm512_load_ps(sums + kTileRows)}; }
BF16_INLINE void store_sums(const Pair& v, float* sums) {
  _mm512_store_ps(sums, v.low);
  _mm512_store_ps(sums + kTileRows, v.high);
}
BF16_INLINE Pair plus(const Pair& a, const Pair& b) { return {a.low + b.low, a.high + b.high}; }

// Loads 32 columns; without kWhole only those of `lanes`, and zeros elsewhere.
template <bool kWhole>
BF16_INLINE Pair load_pair(const bfloat16* columns, __mmask32 lanes) {
  const __m512i line = kWhole ? _mm512_loadu_si512(columns) : _mm512_maskz_loadu_epi16(lanes, columns);
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(line));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(line, 1));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))};
}

// The matrices of a rank_add.
template <bool kMasked>
struct Addition {
  const RankAdd<bfloat16>& op;
  RowPointers<bfloat16> out;
  RowPointers<const bfloat16> in;
  const RowMasks<kMasked>* masks;  // one for each term

  Addition(const RankAdd<bfloat16>& given, const RowMasks<kMasked>* of_terms, int64_t rows_ahead)
      : op(given),
        out(op.rows, op.out, rows_ahead),
        in(op.rows, TokenMatrix<const bfloat16>{op.in ? op.in : op.out.data, op.out.columns, op.out.stride},
           rows_ahead),
        masks(of_terms) {}
};

// The products v of term k in 32 columns of a row from c on, without those that are dropped.
template <bool kMasked>
BF16_INLINE Pair kept_products(const Addition<kMasked>& add, int64_t k, int64_t row, int64_t c, const Pair& v) {
  if (!kMasked || !add.op.terms[k].mask.bytes) return v;
  const __mmask32 kept = kept_lanes(add.masks[k].at[row], c);
  return {_mm512_maskz_mov_ps(__mmask16(kept), v.low), _mm512_maskz_mov_ps(__mmask16(kept >> 16), v.high)};
}

// Adds in and bias to the sum v of all terms in 32 columns of a row from c on, and writes out. Without kWhole only
// `lanes` exist.
template <bool kMasked, bool kWhole>
BF16_INLINE void write_line(const Addition<kMasked>& add, int64_t row, int64_t c, __mmask32 lanes, Pair v) {
  const RankAdd<bfloat16>& op = add.op;
  if (op.in) v = plus(v, load_pair<kWhole>(add.in.at[row] + c, lanes));
  if (op.bias) v = plus(v, load_pair<kWhole>(op.bias + c, lanes));
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(v.high, v.low);
  if (kWhole) {
    _mm512_storeu_si512(add.out.at[row] + c, rounded);
  } else {
    _mm512_mask_storeu_epi16(add.out.at[row] + c, lanes, rounded);
  }
}

// Calls run(masks), with the masks of each term or, if no term has one, with null.
template <typename Run>
void with_masks(const RankAdd<bfloat16>& op, const Run& run) {
  if (std::none_of(op.terms, op.terms + op.count, [](const auto& term) { return term.mask.bytes != nullptr; })) {
    return run(static_cast<const RowMasks<false>*>(nullptr));
  }
  std::vector<RowMasks<true>> masks;
  for (int64_t k = 0; k < op.count; ++k) masks.emplace_back(op.rows, op.terms[k].mask);
  run(static_cast<const RowMasks<true>*>(masks.data()));
}

}  // namespace align::cpu

#endif
