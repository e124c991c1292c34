// A row in global memory, in pieces of 16 bytes; element by element where a piece is not aligned or
// not whole. Nothing beyond the row is touched: there it reads as zeros.
#pragma once
#include "csrc/core/numeric.h"
#include "csrc/simt/simt.h"

namespace atx::ATX_TARGET {

template <class T>
struct Pieces {
  static constexpr int PIECE = 16 / int(sizeof(T));
  struct alignas(16) Piece {
    T x[PIECE];
  };
  T* data;
  int size;

  __device__ __forceinline__ bool whole(int d) const {
    return d + PIECE <= size && reinterpret_cast<uintptr_t>(data + d) % 16 == 0;
  }
  __device__ __forceinline__ void load(int d, float (&to)[PIECE]) const {
    if (whole(d)) {
      const Piece piece = *reinterpret_cast<const Piece*>(data + d);
#pragma unroll
      for (int i = 0; i < PIECE; ++i) to[i] = to_float(piece.x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < PIECE; ++i) to[i] = d + i < size ? to_float(data[d + i]) : 0.f;
    }
  }
  __device__ __forceinline__ void store(int d, const float (&from)[PIECE]) const {
    if (whole(d)) {
      Piece piece;
#pragma unroll
      for (int i = 0; i < PIECE; ++i) piece.x[i] = from_float<T>(from[i]);
      *reinterpret_cast<Piece*>(data + d) = piece;
    } else {
#pragma unroll
      for (int i = 0; i < PIECE; ++i)
        if (d + i < size) data[d + i] = from_float<T>(from[i]);
    }
  }
};

}  // namespace atx::ATX_TARGET
