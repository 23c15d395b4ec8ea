// Host twins of the PTX instructions that feed and run tensor cores: cp.async, ldmatrix and mma, with the fragment
// layouts of the PTX ISA ("Matrix Fragments for mma.m16n8k16", "ldmatrix").
#include <cstring>

#include "engine.h"
#include "ops/convert.h"

namespace simt {
namespace {

constexpr Where kNoLine = {nullptr, 0};
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- mma

struct MmaRequest {
  float* d;
  const uint32_t *a, *b;
};

float element(const uint32_t* fragment, int i, bool is_bf16) {
  const uint16_t bits = uint16_t(fragment[i / 2] >> (16 * (i % 2)));
  return is_bf16 ? align::widen(align::bfloat16{bits}) : align::widen(align::float16{bits});
}

// Lane l holds, with g = l / 4 and q = l % 4, of A (16 x 16, row) a0..a7 at row g (+ 8 for i = 2, 3, 6, 7) and column
// 2 q + i % 2 (+ 8 for i >= 4); of B (16 x 8) b0..b3 at row 2 q + i % 2 (+ 8 for i >= 2) and column g; of C and D
// (16 x 8) d0..d3 at row g (+ 8 for i >= 2) and column 2 q + i % 2.
template <bool is_bf16>
void complete_mma(Rendezvous& all, Thread*) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& request = *static_cast<MmaRequest*>(all.requests[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 8; ++i) {
      a[g + (i / 2 % 2) * 8][2 * q + i % 2 + (i / 4) * 8] = element(request.a, i, is_bf16);
    }
    for (int i = 0; i < 4; ++i) b[2 * q + i % 2 + (i / 2) * 8][g] = element(request.b, i, is_bf16);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& request = *static_cast<MmaRequest*>(all.requests[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + (i / 2) * 8, column = 2 * q + i % 2;
      double sum = request.d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      request.d[i] = float(sum);
    }
  }
}

// Instructions of the whole warp cannot be issued by a part of it.
void require_whole_warp(const void* pc) {
  if (existing_lanes(engine.current->warp()) == kAllLanes) return;
  add_error(ErrorKind::kBadMask, "mma and ldmatrix need all 32 lanes of the warp", pc);
  abort_launch();
}

void mma(MmaRequest request, Complete complete, const void* pc) {
  EngineScope scope;
  require_whole_warp(pc);
  meet(Collective::kMma, kAllLanes, &request, kNoLine, pc, complete);
}

// ---- ldmatrix

struct MatrixRequest {
  uint32_t* result;
  uintptr_t row;
};

// Register i of lane l holds two neighbours of matrix i: row l / 4, columns 2 (l % 4) and the next; transposed, rows
// 2 (l % 4) and the next of column l / 4. What a lane receives counts as read by that lane.
template <int kMatrices, bool kTranspose>
void complete_matrices(Rendezvous& all, Thread* lanes) {
  const auto row = [&](int i) { return static_cast<MatrixRequest*>(all.requests[i])->row; };
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int from = kTranspose ? 2 * (lane % 4) + i : lane / 4;
        const int column = kTranspose ? lane / 4 : 2 * (lane % 4) + i;
        const uintptr_t address = row(8 * matrix + from) + column * sizeof(uint16_t);
        check(lanes[lane], address, sizeof(uint16_t), Op::kLoad, all.pc);
        std::memcpy(&pair[i], reinterpret_cast<const void*>(address), sizeof(uint16_t));
      }
      static_cast<MatrixRequest*>(all.requests[lane])->result[matrix] = pair[0] | uint32_t(pair[1]) << 16;
    }
  }
}

template <int kMatrices, bool kTranspose>
void load_matrices(uint32_t* result, const void* row, const void* pc) {
  EngineScope scope;
  require_whole_warp(pc);
  MatrixRequest request{result, reinterpret_cast<uintptr_t>(row)};
  if (engine.current->lane() < 8 * kMatrices) {
    if (!is_shared(request.row)) {
      add_error(ErrorKind::kOutOfBounds, "ldmatrix from a row that is not in shared memory", pc);
      abort_launch();
    }
    count_access(request.row, 16, Op::kLoad, pc);
  }
  meet(Collective::kMatrixLoad, kAllLanes, &request, kNoLine, pc, complete_matrices<kMatrices, kTranspose>);
}

// ---- cp.async

void start_copy(void* shared, const void* global, int bytes, int source_bytes, const void* pc) {
  EngineScope scope;
  Thread& me = *engine.current;
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  const bool reads_shared = source_bytes > 0 && is_shared(from);  // with no bytes to read, `from` may be anywhere
  if (!is_shared(to) || reads_shared || source_bytes < 0 || source_bytes > bytes || from % bytes != 0) {
    const ErrorKind kind = from % bytes != 0 ? ErrorKind::kMisaligned : ErrorKind::kOutOfBounds;
    add_error(kind, "cp.async goes from aligned global to shared memory, 0 to " + std::to_string(bytes) + " bytes", pc);
    abort_launch();
  }
  if (source_bytes > 0) access(from, source_bytes, Op::kLoad, pc, false);
  count_access(to, bytes, Op::kStore, pc);
  start_copy_write(me, to, bytes, pc);
  me.copies.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes, me.open_group, pc});
}

// Copies of groups up to the last one given happen now, in order.
void finish_copies(Thread& thread, int last_group) {
  size_t done = 0;
  for (; done < thread.copies.size() && thread.copies[done].group <= last_group; ++done) {
    const PendingCopy& copy = thread.copies[done];
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.source_bytes);
    finish_copy_write(thread, reinterpret_cast<uintptr_t>(copy.to), copy.bytes);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
}

}  // namespace

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma({d, a, b}, complete_mma<true>, __builtin_return_address(0));
}
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma({d, a, b}, complete_mma<false>, __builtin_return_address(0));
}

void ldmatrix_x2(uint32_t (&result)[2], const void* row) {
  load_matrices<2, false>(result, row, __builtin_return_address(0));
}
void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  load_matrices<4, false>(result, row, __builtin_return_address(0));
}
void ldmatrix_x2_trans(uint32_t (&result)[2], const void* row) {
  load_matrices<2, true>(result, row, __builtin_return_address(0));
}
void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row) {
  load_matrices<4, true>(result, row, __builtin_return_address(0));
}

void cp_async16(void* shared, const void* global, int source_bytes) {
  start_copy(shared, global, 16, source_bytes, __builtin_return_address(0));
}
void cp_async4(void* shared, const void* global, int source_bytes) {
  start_copy(shared, global, 4, source_bytes, __builtin_return_address(0));
}

void cp_async_commit() {
  EngineScope scope;
  ++engine.current->open_group;
}

void cp_async_wait(int groups_left) {
  EngineScope scope;
  Thread& me = *engine.current;
  finish_copies(me, me.open_group - 1 - groups_left);
}

void cp_async_wait_all() {
  EngineScope scope;
  Thread& me = *engine.current;
  finish_copies(me, me.open_group);
}

}  // namespace simt
