// The kernels of topk_attention, one head, without the checks that a call on a CPU makes before.
#include "csrc/cuda/topk_attention_bwd.cuh"
#include "csrc/cuda/topk_attention_fwd.cuh"
#include "guarded.h"

struct Listed {
  const float *q, *k, *v, *d_o, *delta;  // [Sq, D], [Sk, D], [Sk, D], [Sq, D], [Sq]
  const int32_t* keys;                   // [Sq, length]
  const int64_t* first;
  const int32_t* readers;
  float *o, *lse, *d_q, *d_k, *d_v;
  int Sq, Sk, length, D;
};

extern "C" const char* run_listed(const Listed* x, const atx::Exec* exec) {
  using namespace atx;
  return guarded([&] {
    const Strides rows = {0, 0, x->D};
    TopkAttentionBwdParams p{};
    AttentionParams& f = p.bwd.fwd;
    f.q = x->q, f.k = x->k, f.v = x->v, f.o = x->o, f.lse = x->lse;
    f.q_stride = f.k_stride = f.v_stride = f.o_stride = rows;
    f.B = f.Hq = f.Hkv = 1, f.Sq = x->Sq, f.Sk = x->Sk, f.D = f.Dv = x->D;
    f.dtype = DType::f32, f.scale = 0.25;
    p.bwd.d_o = x->d_o, p.bwd.delta = const_cast<float*>(x->delta);
    p.bwd.d_q = x->d_q, p.bwd.d_k = x->d_k, p.bwd.d_v = x->d_v;
    p.bwd.d_o_stride = p.bwd.d_q_stride = p.bwd.d_k_stride = p.bwd.d_v_stride = rows;
    p.lists = {x->keys, 0, 0, x->length, x->length, 1};
    p.readers = {x->first, x->readers, 0};
    const Exec run = {.stream = const_cast<Exec*>(exec)};
    const Status failed = ATX_TARGET::launch_topk_attention_fwd<float>({f, p.lists}, run);
    return failed ? failed : ATX_TARGET::launch_topk_attention_bwd<float>(p, run);
  });
}
