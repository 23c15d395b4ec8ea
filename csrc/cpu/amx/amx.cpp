// The detection of AMX, packing, and rank_add, which computes pieces of 16 rows and 64 columns.
#include "cpu/amx/amx.h"

#ifdef ALIGN_AMX

#include <algorithm>
#include <cpuid.h>
#include <cstdlib>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

#include "cpu/amx/tiles.h"

namespace align::cpu {

bool amx_usable() {
  static const bool usable = [] {
    const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
    if (limit && !std::strstr(limit, "AMX") && !std::strstr(limit, "DEFAULT")) return false;
    unsigned a, b, c, d;
    if (!__builtin_cpu_supports("x86-64-v4") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTiles = 1u << 24, kAvx512Bf16 = 1u << 5;
    if (!(d & kAmxBf16) || !(d & kAmxTiles)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return usable;
}

// ---- Packing

AMX_TARGET void pack_dot_tiles(RowMajor<const float> matrix, int64_t rank, int64_t first, int64_t last,
                               bfloat16* tiles) {
  const int64_t ranks = round_up(rank, kAmxRows);
  bfloat16* tile = tiles + first / kAmxColumns * ranks * kAmxColumns;
  for (int64_t c = first; c < last; c += kAmxColumns) {
    for (int64_t j = 0; j < ranks; j += kAmxRows, tile += kAmxTile) {
      __m512i rows[kAmxRows];
      for (int64_t k = 0; k < kAmxRows; ++k) {
        rows[k] = rounded_line(matrix.row(j + k) + c, j + k < rank ? first_lanes(last - c) : 0, 1);
      }
      transpose(rows);
      for (int64_t k = 0; k < kAmxRows; ++k) _mm512_storeu_si512(tile + k * kAmxColumns, rows[k]);
    }
  }
}

AMX_TARGET void pack_add_tiles(RowMajor<const float> matrix, int64_t rank, int64_t first, int64_t last,
                               bfloat16* tiles) {
  const int64_t ranks = round_up(rank, kAmxColumns);
  bfloat16* row = tiles + first / kAmxRows * ranks * kAmxRows;
  for (int64_t c = first; c < last; c += kAmxRows) {
    const __mmask16 lanes = __mmask16(first_lanes(last - c));
    for (int64_t j = 0; j < ranks; j += 2, row += kAmxColumns) {
      const __m512 even = _mm512_maskz_loadu_ps(j < rank ? lanes : 0, matrix.row(j) + c);
      const __m512 odd = _mm512_maskz_loadu_ps(j + 1 < rank ? lanes : 0, matrix.row(j + 1) + c);
      _mm512_storeu_si512(row, rounded_pairs(even, odd));
    }
  }
}

// ---- rank_add

namespace {

// Makes the left tiles of scale * g, [kRowBlock][rank padded to 32].
AMX_INLINE void round_factors(const RankTerm<float>& term, int64_t count, bfloat16* factors) {
  for (int64_t t = 0; t < kRowBlock; ++t) {
    for (int64_t j = 0; j < term.rank; j += kAmxColumns, factors += kAmxColumns) {
      const __mmask32 lanes = t < count ? first_lanes(term.rank - j) : 0;
      _mm512_storeu_si512(factors, rounded_line(term.g.row(t) + j, lanes, term.scale));
    }
  }
}

// The sums of a piece of the result are four tiles side by side.
constexpr int64_t kPanel = 128;  // columns whose right tiles stay in the first-level cache for all rows of a block
constexpr int64_t kAddTiles = 4, kAddColumns = kAddTiles * kAmxRows;

// Term k of a piece of 16 rows from t on and 64 columns from c on, and the left tiles of the term.
struct Piece {
  int64_t t, c, k;
  const bfloat16* factors;

  // Goes to the next term; after the last term to the next columns of the panel; after these to the next rows; after
  // the last rows to the next panel, whose right tiles stay in the first-level cache for all rows.
  AMX_INLINE void advance(const RankAdd<bfloat16>& op) {
    factors += factor_tiles(op.terms[k].rank);
    if (++k < op.count) return;
    k = 0;
    factors = op.factors;
    c += kAddColumns;
    if (c % kPanel != 0 && c < op.out.columns) return;
    const int64_t panel = (c - 1) / kPanel * kPanel;
    t += kAmxRows;
    if (t < op.rows.count) {
      c = panel;
    } else if (panel + kPanel < op.out.columns) {
      t = 0;
    }
  }
};

template <int sum>
AMX_INLINE void multiply_column(const bfloat16* right) {
  load_tile<5>(right, 64);
  multiply_add<sum, 4, 5>();
}

// Computes the products of a piece, without tiles that have no columns.
AMX_INLINE void multiply(const RankAdd<bfloat16>& op, const Piece& piece) {
  const RankTerm<float>& term = op.terms[piece.k];
  const int64_t columns = op.out.columns - piece.c;
  const int64_t steps = ceil_div(term.rank, kAmxColumns), stride = steps * kAmxColumns * sizeof(bfloat16);
  const bfloat16* right = term.tiles + piece.c / kAmxRows * steps * kAmxTile;
  begin_sum<0>(nullptr, 0, true);
  begin_sum<1>(nullptr, 0, true);
  begin_sum<2>(nullptr, 0, true);
  begin_sum<3>(nullptr, 0, true);
  for (int64_t step = 0; step < steps; ++step, right += kAmxTile) {
    load_tile<4>(piece.factors + (piece.t * steps + step) * kAmxColumns, stride);
    multiply_column<0>(right);
    if (columns > kAmxRows) multiply_column<1>(right + steps * kAmxTile);
    if (columns > 2 * kAmxRows) multiply_column<2>(right + 2 * steps * kAmxTile);
    if (columns > 3 * kAmxRows) multiply_column<3>(right + 3 * steps * kAmxTile);
  }
}

// Stores the products of a piece, [16][64].
AMX_INLINE void store_products(float* sums) {
  constexpr int64_t kStride = kAddColumns * sizeof(float);
  store_tile<0>(sums, kStride);
  store_tile<1>(sums + kAmxRows, kStride);
  store_tile<2>(sums + 2 * kAmxRows, kStride);
  store_tile<3>(sums + 3 * kAmxRows, kStride);
}

struct Pair {  // 32 columns
  __m512 low, high;
};
AMX_INLINE Pair load_sums(const float* sums) { return {_mm512_load_ps(sums), _mm512_load_ps(sums + kAmxRows)}; }
AMX_INLINE Pair plus(const Pair& a, const Pair& b) { return {a.low + b.low, a.high + b.high}; }

// Loads 32 columns; without kWhole only those of `lanes`, and zeros elsewhere.
template <bool kWhole>
AMX_INLINE Pair load_pair(const bfloat16* columns, __mmask32 lanes) {
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

  Addition(const RankAdd<bfloat16>& given, const RowMasks<kMasked>* of_terms)
      : op(given),
        out(op.rows, op.out, kAmxRows),
        in(op.rows, TokenMatrix<const bfloat16>{op.in ? op.in : op.out.data, op.out.columns, op.out.stride}, kAmxRows),
        masks(of_terms) {}
};

// Adds the sums of one term to those of the terms before it, in further. The last term also adds in and bias, and
// writes out.
template <bool kMasked, bool kWhole>
AMX_INLINE void add_piece(const Addition<kMasked>& add, const Piece& piece, const float* sums, float* further) {
  const auto& [t, first, k, factors] = piece;
  const RankAdd<bfloat16>& op = add.op;
  const int64_t rows = std::min(kAmxRows, op.rows.count - t);
  const int64_t columns = kWhole ? kAddColumns : std::min(kAddColumns, op.out.columns - first);
  const bool last = k + 1 == op.count;
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int64_t line = 0; line < columns; line += kAmxColumns) {
      const int64_t c = first + line, offset = i * kAddColumns + line;
      const __mmask32 lanes = kWhole ? ~0u : first_lanes(columns - line);
      Pair v = load_sums(sums + offset);
      if (kMasked && op.terms[k].mask.bytes) {
        const __mmask32 kept = kept_lanes(add.masks[k].at[t + i], c);
        v = {_mm512_maskz_mov_ps(__mmask16(kept), v.low), _mm512_maskz_mov_ps(__mmask16(kept >> 16), v.high)};
      }
      if (k > 0) v = plus(v, load_sums(further + offset));
      if (!last) {
        _mm512_store_ps(further + offset, v.low);
        _mm512_store_ps(further + offset + kAmxRows, v.high);
        continue;
      }
      if (op.in) {
        prefetch(add.in.ahead[t + i] + c);
        v = plus(v, load_pair<kWhole>(add.in.at[t + i] + c, lanes));
      }
      if (op.bias) v = plus(v, load_pair<kWhole>(op.bias + c, lanes));
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(v.high, v.low);
      if (kWhole) {
        _mm512_storeu_si512(add.out.at[t + i] + c, rounded);
      } else {
        _mm512_mask_storeu_epi16(add.out.at[t + i] + c, lanes, rounded);
      }
    }
  }
}

template <bool kMasked>
AMX_TARGET void rank_add_pieces(const RankAdd<bfloat16>& op, const RowMasks<kMasked>* masks) {
  const Addition<kMasked> add(op, masks);
  bfloat16* factors = op.factors;
  for (int64_t k = 0; k < op.count; ++k) {
    round_factors(op.terms[k], op.rows.count, factors);
    factors += factor_tiles(op.terms[k].rank);
  }
  const Tiles tiles;
  alignas(64) float sums[kAmxRows * kAddColumns], further[kAmxRows * kAddColumns];
  if (op.rows.count == 0 || op.out.columns == 0) return;
  // The tiles multiply one piece while the vectors add up the piece before, whose products have been stored.
  Piece next{0, 0, 0, op.factors};
  multiply(op, next);
  while (next.t < op.rows.count) {
    const Piece now = next;
    store_products(sums);
    next.advance(op);
    if (next.t < op.rows.count) multiply(op, next);
    if (now.c + kAddColumns <= op.out.columns) {
      add_piece<kMasked, true>(add, now, sums, further);
    } else {
      add_piece<kMasked, false>(add, now, sums, further);
    }
  }
}

}  // namespace

void amx_rank_add(const RankAdd<bfloat16>& op) {
  if (std::none_of(op.terms, op.terms + op.count, [](const auto& term) { return term.mask.bytes != nullptr; })) {
    return rank_add_pieces<false>(op, nullptr);
  }
  std::vector<RowMasks<true>> masks;
  for (int64_t k = 0; k < op.count; ++k) masks.emplace_back(op.rows, op.terms[k].mask);
  rank_add_pieces<true>(op, masks.data());
}

}  // namespace align::cpu

#else

namespace align::cpu {
bool amx_usable() { return false; }
}  // namespace align::cpu

#endif
